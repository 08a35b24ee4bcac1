"""For programs in C++: the header, the sources and the flags to build them with, and a model as a file they can read.

    $ python -c "import anabranch.cpp as c; c.save_program(model, [x], 'model.program')"   # in a script of yours, say
    $ g++ -O2 main.cpp $(python -m anabranch.cpp --sources --cflags --ldflags) -o main

The program needs no Python once it is built. ``docs/cpp.md`` has an example and says what is missing without Python.
"""

from __future__ import annotations

from pathlib import Path

from anabranch.cpp._save import save_program

__all__ = ["cmake_path", "compile_flags", "include_paths", "link_flags", "save_program", "sources"]

_PACKAGE = Path(__file__).parents[1]


def cmake_path() -> Path:
    """A folder for ``add_subdirectory``: it defines the target ``anabranch``, and finds PyTorch by ``Torch_DIR``."""
    return _PACKAGE / "cpp"


def sources() -> list[Path]:
    """What is compiled along with a program: half a minute. None of it includes Python's headers."""
    folders = _PACKAGE / "cpp", _PACKAGE / "runtime" / "_core"
    return [source for folder in folders for source in sorted(folder.glob("*.cpp"))]


def include_paths() -> list[Path]:
    """Where ``anabranch/engine.h`` is, and then PyTorch's headers."""
    from anabranch._extension import cpp_extension

    return [_PACKAGE / "include", *map(Path, cpp_extension.include_paths())]


def compile_flags() -> list[str]:
    """For g++ or clang++: the standard, the ABI of this PyTorch, and the include paths."""
    import torch

    ours, *torchs = include_paths()
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    return ["-std=c++20", abi, f"-I{ours}", *(f"-isystem{path}" for path in torchs)]


def link_flags() -> list[str]:
    """For the linker: this PyTorch's libraries, and where they are found at run time. None of them is Python's."""
    from anabranch._extension import cpp_extension

    folder = cpp_extension.TORCH_LIB_PATH
    # Nothing refers to libtorch by name, and it is what brings libtorch_cuda along. That in turn needs CUDA's own
    # libraries, which the loader finds and the linker need not.
    names = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--as-needed"]
    return [f"-L{folder}", f"-Wl,-rpath,{folder}", "-Wl,--allow-shlib-undefined", *names, "-ldl", "-pthread"]
