"""What each error text of the package says, for ``test_error_texts.py``.

``TEXTS`` has, by file, an entry for each text: three pieces of it, or two.

    ("CXX is {given}, and there is no such program", "name a C++17 compiler", "unset it")
     what was given                                  what was expected        what to do

Where what was expected is what to do ("expected one of 'inductor', 'eager'"), one piece is enough for both. Pieces are
quoted as they stand in the source, ``{expression}`` for what is put in at run time; in C++ ``{}``.

``INTERNAL`` has the texts that no caller sees alone, each with the reason.
"""

from __future__ import annotations

#: Classes of exceptions that never reach a caller, whatever their text.
CAUGHT = {
    "Rejected": "the reason of a fallback, which explain() shows",
    "Unconvertible": "the reason of a fallback, which explain() shows",
    "Unreadable": "the reason why calls copy their inputs, which explain() shows",
    "_Unbindable": "the reason why calls copy their inputs, which explain() shows",
    "_Untranslatable": "the reason why calls are queued from Python, which explain() shows",
    "_Unknown": "the reason why calls are queued from Python, which explain() shows",
    "_Whole": "the reason why a program is not cut into pieces, which explain() shows",
    "NotCarried": "the reason why a number is a part of the signature, which explain() shows",
    "_Kept": "the reason why operators take a number as it is, which explain() shows",
    "NotReady": "a cell of the benchmark's table",
    "_NoView": "why a result is no view, which the error says",
    "_StopTrial": "ends a call that nobody asked for",
    "_TooSlow": "a cell of the benchmark's table",
}

INTERNAL = {
    "src/anabranch/export/_istft.py": [
        ("istft does not accept these arguments", "raised in a trace; the model is then run, and PyTorch says it"),
    ],
    "src/anabranch/calibrate/_operator.py": [
        ("half precision has other bits than float32", "caught where it is computed: that operator is in float32 then"),
    ],
    "src/anabranch/calibrate/_reference.py": [
        ("float64 has other bits than float32", "caught where it is computed: that operator is in float32 then"),
    ],
    "src/anabranch/_entry_point.py": [("has no attribute", "Python's own text")],
    "src/anabranch/__init__.py": [("has no attribute", "Python's own text")],
    "src/anabranch/backends/tensorrt/_cache.py": [
        ("it is for something else", "a warning; the entry is built again"),
        ("it is damaged", "a warning; the entry is built again"),
        ("it cannot be read", "a warning; the entry is built again"),
        ("no entry of this cache", "a warning; the entry is built again"),
    ],
    "src/anabranch/bench/_command.py": [("it has no works", "a part of the text about the file")],
    "src/anabranch/runtime/_engine.py": [
        ("its tensors are on {device}", "the reason why operators run a graph, which explain() shows"),
    ],
    "src/anabranch/cpp/_save.py": [
        ("which is a {type(value).__name__}", "a part of the text about the operator's argument"),
        ("which program files do not know", "a part of the text about the operator's argument"),
    ],
    "src/anabranch/cpp/device.cpp": [
        ("making a stream failed with code", "CUDA's own code, at a call that fails only on a lost device"),
    ],
    "src/anabranch/cpp/engine.cpp": [
        (
            "asking whether the stream is under capture failed",
            "CUDA's own code, at a call that fails only on a lost device",
        ),
    ],
    "src/anabranch/cpp/lowering.cpp": [
        ("is given where the schema says", "a part of the text about the step"),
        ("given, and so far there are", "a part of the text about the step"),
        ("which is not said to be written", "a part of the text about the step"),
        ("a step without a name takes", "a part of the text about the step"),
    ],
    "src/anabranch/devices/_cpu.py": [
        ("the CPU has no", "the runtime asks a device without streams for none of these"),
    ],
    "src/anabranch/devices/cuda/_calls.py": [("failed: {", "CUDA's own error")],
    "src/anabranch/devices/cuda/_graph.py": [("cudaGraphLaunch", "CUDA's own error")],
    "src/anabranch/devices/cuda/_lane.py": [("failed: {", "CUDA's own error")],
    "src/anabranch/devices/cuda/_driver.py": [("failed with CUDA driver error", "CUDA's own error")],
    "src/anabranch/explore/_explore.py": [("the program returned what cannot", "before a text of anabranch._judge")],
    "src/anabranch/explore/_locks.py": [
        ("timeout value must be", "Python's own text"),
        ("cannot join current thread", "Python's own text"),
        ("can't specify a timeout", "Python's own text"),
        ("cannot release un-acquired lock", "Python's own text"),
        ("'timeout' must be", "Python's own text"),
    ],
    "src/anabranch/explore/_schedulers.py": [
        ("of the script is one of", "the search turns it into NotDeterministic"),
        ("step after {len(self._steps)} others was", "the search turns it into NotDeterministic"),
    ],
    "src/anabranch/explore/_shared.py": [("object has no attribute", "Python's own text")],
    "src/anabranch/race/_detector.py": [
        ("no memory for a race detector", "the process has no memory left"),
        ("no memory for the reports", "the process has no memory left"),
    ],
    "src/anabranch/runtime/_compiler.py": [("{e} Compiled so far", "the text of another error, with an addition")],
    "src/anabranch/runtime/_core/argument.cpp": [
        ("arguments given, the schema has", "a part of the text about the step"),
        ("given, which has no default", "a part of the text about the step"),
        ("a list is given for", "the reason why calls are queued from Python, which explain() shows"),
        ("that is computed", "the reason why calls are queued from Python, which explain() shows"),
        ("expected a value from a slot", "a rule between the package's own functions"),
    ],
    "src/anabranch/runtime/_core/numbers.cpp": [
        ("no operation on numbers is called", "a rule between the package's own functions"),
    ],
    "src/anabranch/runtime/_core/program.cpp": [
        ("the program takes {} values", "a rule between the package's own functions"),
        ("expected a tensor", "a rule between the package's own functions"),
        ("a kernel of {} parameters is given {}", "a rule between the package's own functions"),
        ("this device launches no kernels", "a rule between the package's own functions"),
        ("launching a kernel", "the driver's code says what is wrong; see DeviceError"),
    ],
    "src/anabranch/runtime/_core/tensors.cpp": [
        ("a size is {}", "a rule between the package's own functions"),
    ],
    "src/anabranch/runtime/_core/python/allocations.cpp": [
        ("this log of allocations is", "a rule between the package's own functions"),
        ("a profiler watches this thread", "the reason why calls copy their inputs, which explain() shows"),
        ("ends on the thread that began it", "a rule between the package's own functions"),
    ],
    "src/anabranch/runtime/_core/python/specialization.cpp": [
        ("expected a torch.Event", "a rule between the package's own functions"),
        ("the slot is in other hands", "a rule between the package's own functions"),
    ],
    "src/anabranch/runtime/_core/python/values.cpp": [
        ("a kernel's result is neither", "a rule between the package's own functions"),
    ],
    "src/anabranch/sim/_core/backend.cpp": [("not an address of device memory", "PyTorch gives none")],
    "src/anabranch/sim/_core/bindings.cpp": [
        ("there is no stream", "a rule between the package's own functions"),
        ("no capture {} is under way", "a rule between the package's own functions"),
    ],
    "src/anabranch/sim/_core/machine.cpp": [
        ("of sim:{} does not exist", "PyTorch makes no such stream"),
        ("has nothing that can run", "a rule between the package's own functions"),
        ("was made to fail", "a fault that a test planted"),
    ],
    "src/anabranch/sim/_core/memory.cpp": [("the host has no {} bytes", "the process has no memory left")],
    "src/anabranch/sim/_core/ops.cpp": [
        ("its CPU kernel returned", "PyTorch's meta kernel and its CPU kernel differ"),
        ("Expected all tensors to be on the same device", "PyTorch's own text"),
        ("device type for generator", "PyTorch's own text"),
        ("indices should be either on cpu", "PyTorch's own text"),
    ],
    "src/anabranch/sim/_core/random.cpp": [("device type for generator", "PyTorch's own text")],
    "src/anabranch/sim/_core/views.cpp": [
        ("Trying to resize storage", "PyTorch's own text"),
        ("Only dense CPU tensors can be pinned", "PyTorch's own text"),
        ("Unsupported memory format", "PyTorch's own text"),
    ],
}

TEXTS: dict[str, list[tuple[str, ...]]] = {
    "src/anabranch/_exit.py": [("{path} cannot be written: {e.strerror}", "name another file")],
    "src/anabranch/_judge/_structure.py": [
        ("{len(inputs)} inputs given and {len(expected_inputs)} expected_inputs", "expected as many"),
        ("the output holds itself", "nested too deeply", "return its tensors in a list"),
        ("{name} is an array of Python objects", "return a tensor"),
        ("{name} is {kinds[1]}", "whose elements cannot be compared", "return {_instead(kinds[1])}"),
        ("{name} is a set of tensors", "which has no order", "return a list or a dict"),
        ("{name} is {_a(expected)}", "which cannot be compared", "return tensors, numbers, strings"),
    ],
    "src/anabranch/_toolchain.py": [
        ("found no compiler (looked for c++, g++, clang++)", "compiles its C++ core at first use", "install one"),
        ("{why}", "not kept where others can exchange them", "set XDG_CACHE_HOME to a folder that only you can write"),
        ("compiling {name} failed", "expected a compiler for C++20", "Name one in CXX"),
        ("CXX is {given}", "name a C++17 compiler", "unset it"),
        ("{shlex.join(compiler)} --version failed", "name a C++ compiler in CXX"),
        ("cannot write to {target.parent}", "a folder that you can write to", "set XDG_CACHE_HOME"),
        ("{why}", "a folder of your own", "set XDG_CACHE_HOME"),
        ("cannot write {target}", "remove what is there"),
    ],
    "src/anabranch/ahead/_build.py": [
        ("backend={backend} given, which {which}", "expected 'tensorrt'"),
        ("parameters are on several devices ({", "expected one", "Call model.to('cpu')"),
        ("could not be kept in {cache.folder}", "Make room there", "give another folder as cache"),
        ("compute capability {given} given", "expected one such as 8.9"),
        ("engines cannot be kept in {folder}: {why}", "Give a folder that you can write to"),
        ("does not run this model: {why}", "require_full=True", "Leave require_full out"),
        ("no compute capability given", "Give the one of the GPU that engines are for"),
        ("Input shape {tuple(map(str, x.shape))} given", "engines are for one shape", "Give numbers, and build once"),
    ],
    "src/anabranch/ahead/_command.py": [
        ("{option} given with {model}", "an exported program keeps its own", "Export it so"),
        ("interrupted", "finished engines are in the cache", "Run the command again"),
        ("{model} called sys.exit({e.code})", "give a model that returns tensors"),
    ],
    "src/anabranch/backends/_registry.py": [("backend {name} given", "expected one of {")],
    "src/anabranch/backends/_inductor.py": [
        ("Inductor could not compile the model: {type(e).__name__}: {e}", "backend='eager' runs it"),
    ],
    "src/anabranch/backends/tensorrt/_builder.py": [
        ("builds engines only for a GPU that is there", "needs TensorRT-RTX", "pip install tensorrt-rtx"),
        ("compute capability {", "builds ahead of time for {", "On a machine with that GPU, compile() builds"),
    ],
    "src/anabranch/backends/tensorrt/_compiler.py": [
        ("{len(fallbacks)} of {len(everything)} operators cannot run", "require_full=True given", "Change the model"),
    ],
    "src/anabranch/backends/tensorrt/_execution.py": [
        ("could not make an execution context: {said(complaints)}", "Free device memory", "use another backend"),
        ("TensorRT says that its work cannot be captured", "needs a capture", "use another backend"),
        ("could not run the engine: {said(complaints)}", "Compile it again, or with another backend"),
        ("does not take shape {list(shape)} for {name}", "Compile with dynamic=False, or with another backend"),
    ],
    "src/anabranch/backends/tensorrt/_library.py": [
        ("which cannot be imported here ({", "needs TensorRT", "Do: pip install"),
        ("ANABRANCH_TENSORRT={wanted} is set", "expected one of {"),
    ],
    "src/anabranch/bench/_command.py": [
        ("--device cuda given", "PyTorch sees no GPU here", "use --device cpu"),
        ("{source} is no file that --json wrote", "give one"),
    ],
    "src/anabranch/bench/_measure.py": [("its outputs are {what}", "could not be told", "give another work or shape")],
    "src/anabranch/bench/_plot.py": [("--plot needs matplotlib", "pip install")],
    "src/anabranch/bench/_system.py": [
        ("system {name} given", "expected one of {"),
        ("system {name}: {e}", "Expected module:callable with the module on PYTHONPATH"),
    ],
    "src/anabranch/bench/_work.py": [
        ("work {name} given", "expected one of {"),
        ("which is not installed", "work {name} needs {work.needs}", "pip install {work.needs}"),
        ("{shape} is not a shape", "expected one such as 1,3,224,224"),
    ],
    "src/anabranch/calibrate/_calibrate.py": [
        ("the model returns no floating-point tensors", "expected some whose error can be measured"),
        ("a result of the model has no finite element in {reference.name}", "give samples on which it is right"),
        ("reference={reference} given", "expected torch.float32 or torch.float64"),
    ],
    "src/anabranch/calibrate/_samples.py": [
        ("{data} gives a {", "expected a tensor, a tuple of positional inputs"),
        ("{data} gives no samples", "expected a tensor, a tuple of positional inputs"),
        ("{data} gives samples of several shapes or types ({", "expected one. Calibrate for one shape"),
        ("--data {data}: raised {", "Expected module:callable, with the module on PYTHONPATH"),
        ("--data {path}: cannot be read ({", "Expected a file of torch.save with a list of samples"),
        ("{data} gives a sample that is a {", "expected a tensor, a tuple of positional inputs"),
    ],
    "src/anabranch/check/_bench.py": [("calls did not return within", "a call must not wait for the device")],
    "src/anabranch/check/_case.py": [
        ("model {model} given", "expected one of {"),
        ("model {model} is a {type(factory).__name__}", "expected a callable that returns an nn.Module"),
        ("{path}: takes {len(example)} inputs", "check needs a program of one tensor input"),
        ("model {subject.name} has no default shapes", "give --shape"),
        ("model {model}: {e}", "Expected module:callable with the module on PYTHONPATH"),
        ("model {model}: {module_name} is no module's name", "expected module:callable"),
        ("importing {module_name} raised {described(e)}", "Expected a module that can be imported"),
        ("{attribute}() raised {described(e)}", "Expected a call without arguments that returns an nn.Module"),
        ("an input of {self.shape_name} {self.dtype_name} is {", "the check needs {", "give a smaller --shape"),
        ("{model} returned a {type(made).__name__}", "expected an nn.Module"),
    ],
    "src/anabranch/check/_command.py": [
        ("--device cuda given", "PyTorch sees no GPU here", "use --device cpu"),
        ("--inject {options.inject}", "device 'cpu' has no streams", "Run it with --device sim"),
        ("{model} called sys.exit({e.code})", "expected a model that returns"),
    ],
    "src/anabranch/check/_eager.py": [
        ("eager PyTorch gives two results for one input", "no output can be compared", "Check it without"),
        ("the model raises where it gets {", "Expected a model of one tensor", "give a --shape and a --dtype"),
    ],
    "src/anabranch/check/_run.py": [
        ("--inject {options.inject} needs streams", "device {options.device} has none", "use --device cuda"),
    ],
    "src/anabranch/cli/_bench.py": [
        ("{value}", "expected numbers of 1 or more"),
        ("{value}", "expected numbers such as 1 4 16"),
    ],
    "src/anabranch/cli/_options.py": [
        ("{value}", "sizes must be 0 or more"),
        ("{value} is not a shape", "expected sizes separated by commas"),
    ],
    "src/anabranch/cpp/_save.py": [
        ("output {position} is a parameter that nothing else uses", "return a copy of it"),
        ("no path given", "expected save_program(model, inputs, path)"),
        ("{engine} runs kernels of {backend}", "only Python can launch", "give save_program the model itself"),
        ("the model cannot be saved for C++: {why}", "docs/cpp.md says what C++ lacks", "Engines in Python run it"),
        ("the model's {name} is a {what}", "files hold plain tensors", "Engines in Python run it"),
        ("{what} is {dtype}", "which program files do not know", "Engines in Python run it"),
        ("output {position} is {value}", "in C++ results are tensors", "Engines in Python run it"),
        ("output {position} is a lazy conjugate or negative", "return .resolve_conj().resolve_neg() of it"),
        ("output {position} is a view of {whose}", "return a copy of it (.clone())"),
        ("the model calls {step.name}", "no operator of PyTorch itself", "Engines in Python run it"),
        ("inputs, kwargs or precision given with an engine", "which has its own", "leave them out"),
        ("{target} cannot be written ({e})", "give a path that can"),
        ("{step.name} ({", "takes {e}", "Engines in Python run it"),
    ],
    "src/anabranch/cpp/device.cpp": [
        ("{}", "engines in C++ run on cpu and cuda", "give one of these"),
        ("{}, and the PyTorch in this process has no CUDA", "Link one that has", "or give cpu"),
        ("{}, and there are {} such devices", "give one of them, or cpu"),
    ],
    "src/anabranch/cpp/engine.cpp": [
        ("{} is not dense in memory", "expected a tensor that is", "Pass initial.contiguous()"),
        ("{} is given twice", "expected one tensor of each name", "Give each another name"),
        ("an engine was run itself, and its model keeps state ({})", "which is a session's", "Make one with"),
        ("{} is no plain tensor with memory", "expected one", "Pass {}.clone()"),
        ("{} is on {}", "this engine runs on {}", "Pass {}.to("),
        ("{} does not fit into its storage", "expected a storage of all of its elements", "Pass {}.clone()"),
        ("{} inputs given", "this engine takes {}"),
        ("input {} requires grad", "engines run inference only", "Pass x.detach()"),
        ("its stream is under capture", "engines in C++ cannot take part in", "Call the engine outside the capture"),
    ],
    "src/anabranch/cpp/inputs.cpp": [
        ("{} is undefined", "expected {}", "Pass a tensor"),
        ("{} is on {}", "this engine runs on {}", "or load another engine there"),
        ("{} has layout {}", "expected Strided", "Pass x.to_dense()"),
        ("{} is a lazy conjugate", "expected its values in memory", "Pass x.resolve_conj()"),
        (
            "{} stands in for another tensor, or is of another kind",
            "expected a plain one with memory",
            "Pass x.clone()",
        ),
        ("{} is {}", "this engine takes {}", "save a program for yours"),
        ("{} and input {} share memory", "the model writes into {}", "Pass tensors with memory of their own"),
        ("{} is expanded", "the model writes into it", "Pass x.contiguous()"),
        ("sizes {} of an input given", "each must be 0 or more"),
        ("{} strides of an input given, and {} sizes", "give as many, or none"),
    ],
    "src/anabranch/cpp/session.cpp": [
        ("a session is in use by another call", "its calls follow one another", "Use a session for each thread"),
        ("an earlier call of a session failed", "({})", "Call session.reset(), or session.load()"),
        ("{} is missing", "expected {}", "Give each of them"),
        ("{} is no plain tensor with memory", "expected {}", "Pass x.clone()"),
        ("{} is {}", "expected {}", "Give what state() gave"),
        ("state '{}' is none of the model's", "expected {}", "Leave it out"),
    ],
    "src/anabranch/cpp/lowering.cpp": [
        ("slot {} is a result, and it is state", "which the next call changes", "Return a copy of it"),
        ("step {} of the program ({", "what the operator's schema says", "Give each step"),
    ],
    "src/anabranch/cpp/file.cpp": [
        ("the dtype {}", "not known to this version", "Save it with the anabranch"),
        ("the memory format {}", "not known to this version", "Save it with the anabranch"),
        ("an argument of kind {}", "not known to this version", "Save it with the anabranch"),
        ("format version {} given", "this build reads version {}", "Save it with the anabranch"),
        ("{}: cannot be opened ({})", "Expected a file that anabranch.cpp.save_program wrote"),
        ("{}: is no program file ({})", "Expected a file that anabranch.cpp.save_program wrote"),
        ("{}: is no program file (its content", "Expected a file that anabranch.cpp.save_program wrote"),
        ("{}: is damaged ({})", "Save it again"),
        ("{}: is damaged (something is missing)", "Save it again"),
    ],
    "src/anabranch/devices/cuda/_calls.py": [
        ("cuda-bindings, which is not installed here", "CUDA engines need the package", "Do: pip install"),
    ],
    "src/anabranch/devices/cuda/_device.py": [
        ("the GPU reported an error that lasts", "now raises DeviceLost", "Start a new process"),
    ],
    "src/anabranch/devices/cuda/_graph.py": [
        ("was invalidated before this call", "something was done that CUDA forbids", "Begin the capture again without"),
    ],
    "src/anabranch/devices/_turns.py": [
        (
            "other threads wait for the whole device",
            "CUDA allows no capture meanwhile",
            "Wait for a stream or an event",
        ),
    ],
    "src/anabranch/devices/_registry.py": [
        ("device {kind} given", "engines run on 'cuda', 'cpu' or 'sim'", "Move the model and its inputs there"),
        ("device 'sim' given", "needs the module anabranch.sim", "Do: import anabranch.sim"),
    ],
    "src/anabranch/explore/_command.py": [
        ("--args {arguments} is {type(args).__name__}", "expected a tuple"),
        ("{program} cannot be imported: {type(error).__name__}: {error}", "Expected a program that python can import"),
    ],
    "src/anabranch/explore/_controlled.py": [
        ("controlled() was called inside another controlled block", "call it outside"),
    ],
    "src/anabranch/explore/_explore.py": [
        ("explore() was called inside another exploration", "call it outside"),
        ("oracle {', '.join(sorted(unknown))} given", "expected some of {"),
        ("schedules={schedules}, steps={steps} given", "expected 1 or more of each"),
        ("scheduler {scheduler} given", "expected 'exhaustive' or a scheduler"),
    ],
    "src/anabranch/explore/_program.py": [
        ("{target} is {type(found).__name__}", "expected a function"),
        ("{name}: no such file", "expected program.py or module:function"),
        ("{module_name} has no function {", "give PROGRAM:FUNCTION"),
        ("{text} is not a Python literal", "expected one such as (3,)"),
        ("there is no module {name}", "expected program.py or module:function"),
    ],
    "src/anabranch/explore/_runner.py": [
        ("ended in the middle of its answer", "expected memory for two copies", "Free memory and run it again"),
    ],
    "src/anabranch/explore/_schedule.py": [("{part} in the schedule is not an actor", "expected one such as T0*12")],
    "src/anabranch/explore/_schedulers.py": [
        ("of the schedule is one of {self._actors[index]}", "these can: {can}", "replay it with that one"),
    ],
    "src/anabranch/explore/_search.py": [
        ("ended after {len(run.steps)} steps", "Expected a program that depends on the schedule alone", "Remove what"),
        (
            "was {before.label} and is now {step.label}",
            "Expected a program that depends on the schedule",
            "Remove what",
        ),
        ("before step {index} these could go on", "Expected a program that depends on the schedule", "Remove what"),
    ],
    "src/anabranch/explore/_verdict.py": [
        ("{self} has no trace", "only a failing schedule or a single one keeps it", "Replay one schedule"),
    ],
    "src/anabranch/export/_containers.py": [
        ("whose tensors are not made yet", "expected them to be there", "Call cache.early_initialization("),
        ("which counts tokens in a Python number", "Expected layers that count in tensors", "Use anabranch.generation"),
        ("is given with a {type(layer).__name__}", "expected layers of fixed size", "Use anabranch.generation"),
    ],
    "src/anabranch/export/_diagnosis.py": [
        ("is a TorchScript module ({", "torch.export cannot look into", "Give compile the Python module"),
        ("the model's {name} is {kind}", "engines compute with plain, dense tensors", "{instead}"),
        ("the model calls an engine{where}", "Engines run on real tensors only", "compile a model without it"),
        ("torch.export cannot capture this model{where}: {text}", "An engine needs a graph", "torch.cond expresses"),
        ("does not accept these inputs ({", "Expected inputs that model(*inputs) runs on", "try that first"),
        ("does not accept inputs on several devices ({", "Expected inputs on one device", "have the model move them"),
        ("torch.export cannot capture this model, which runs in eager{where}", "{text}", "{advice}"),
    ],
    "src/anabranch/export/_functional.py": [
        (
            "the model writes into an expanded tensor ({",
            "one place in memory stands for several elements",
            "Call .clone() first",
        ),
    ],
    "src/anabranch/export/_leaks.py": [
        (
            "the model keeps a tensor that it computes in {where}",
            "outside of itself",
            "Return it, keep it in an attribute",
        ),
    ],
    "src/anabranch/export/_hooks.py": [
        ("a hook is registered for every module of the process ({", "compiling would run it", "Remove it while"),
    ],
    "src/anabranch/export/_outputs.py": [
        ("the model returns a tensor that is {kind} ({", "engines return dense ones", "Return {instead} of it"),
        ("output {value.name} is a view of {root.name}", "whose shape depends on another tensor", "return a copy"),
    ],
    "src/anabranch/export/_mixed.py": [
        ("Mixed of dtype={self.dtype} given", "expected torch.float16 or torch.bfloat16"),
        ("Mixed with {name}={given} given", "expected a list of modules and operators, such as"),
        ("no mixed precision can be read from it", "Expected a file that `anabranch calibrate` has written"),
        ("Mixed with {entry} given", "the model has no such module", "expected a name of model.named_modules()"),
        ("precision={given} given", "expected None, torch.float16, torch.bfloat16, 'mixed'"),
    ],
    "src/anabranch/export/_precision.py": [
        ("precision={self.precision} given", "whose values it cannot hold", "scale the values, or leave precision out"),
    ],
    "src/anabranch/export/_exporter.py": [
        ("the model changes a list or a dict that it is given", "no graph does", "return the new items instead"),
        (
            "depend on state of Python's: a call {",
            "An engine would repeat what it",
            "or call the model once before",
        ),
        ("sets the state of a random generator ({first.seeds})", "which is no part of a graph", "Seed before the call"),
        ("changes a tensor in place that it holds", "expected state in buffers", "Register it with register_buffer()"),
    ],
    "src/anabranch/export/_program.py": [
        ("and was given one that is not dense", "the memory of input {position} past its shape", "Pass x.contiguous()"),
        (
            "the memory of its state {state.name} past its shape",
            "keeps no more than the state",
            "Register its .clone()",
        ),
        ("the model uses {spec.target}", "expected tensors only", "Hold it outside the model"),
        ("the model is given a torch.Generator", "In one graph it must draw from PyTorch's default generator"),
        ("draws from a torch.Generator of its own{where}", "In one graph it must draw from PyTorch's default"),
        ("input {spec.arg.name} is a {type(spec.arg).__name__}", "expected a tensor or a constant"),
    ],
    "src/anabranch/export/_state.py": [
        (
            "buffer {name}, which was None when it was compiled",
            "expected state to be there from the",
            "Register a tensor",
        ),
        ("writes {name} within a transform of torch.func", "expected writes outside of those", "use copy_() to write"),
        ("writes its buffer {name}, which is not dense", "expected state that is", "Register its .clone()"),
        (
            "an effect beside its results ({what} {",
            "expected writes into inputs and buffers",
            "Leave it out of the engine",
        ),
    ],
    "src/anabranch/export/_writes.py": [
        (
            "changes the shape or the memory of {what} in place ({node.target})",
            "expected inputs and buffers to keep theirs",
            "Take a view, or use copy_()",
        ),
        ("the model writes its parameter {name}", "an engine writes inputs and buffers only", "Register it with"),
        ("precision={precision} given, and the model writes {what}", "the write would be lost", "Give it that type"),
        ("which is a lazy {kind}", "an engine writes what lies in memory", "Call {how}() first"),
        ("one place in memory stands for several elements", "expected each to have its own", "Pass x.clone()"),
        ("which shares memory with {what}", "an engine keeps state in memory of its own", "Register buffers that are"),
        (
            "assigns {what} to its buffer {plain} and also",
            "state of an engine has memory of its own",
            "or use copy_()",
        ),
        ("and returns a part of it{where}", "Expected views whose shapes depend on that input alone", "Return a copy"),
    ],
    "src/anabranch/export/_sizes.py": [
        ("Dim name {self.name} given", "expected a name like 'batch'"),
        ("{self} given", "expected 0 <= min <= max"),
        ("pad_to={list(self.pad_to)} given for {self}", "expected sizes of 2 or more, within its bounds"),
    ],
    "src/anabranch/export/_signature.py": [
        ("input {position} is a {kind.__name__}", "expected tensors, numbers, strings", "Register other containers"),
        ("input {position} is numpy's {kind.__name__}", "expected {what}", "Pass {instead}"),
        ("input {position} is a {kind.__name__}", "expected a plain torch.Tensor"),
        ("Input shape {self.shape} given", "sizes must be 0 or more"),
        ("Input shape {self.shape} given", "which needs {rank} sizes", "give as many"),
        ("input {position} is on {x.device}", "this engine runs on {device}", "Pass x.to("),
        ("input {position} is on {x.device}", "it was on the CPU when the engine was compiled", "Pass x.cpu()"),
        ("input {position} requires grad", "engines run inference only", "Pass x.detach()"),
        ("input {position} has layout {x.layout}", "expected torch.strided", "Pass x.to_dense()"),
        (
            "input {position} belongs to a torch.func transform",
            "engines run inference on plain tensors",
            "Call the engine",
        ),
        ("input {position} is a nested tensor", "expected a dense one", "Pass x.to_padded_tensor(0.0)"),
        ("input {position} is quantized ({x.dtype})", "expected plain values", "Pass x.dequantize()"),
        ("input {position} has named dimensions", "expected none", "Pass x.rename(None)"),
        ("input {position} is a zero without memory of its own", "Pass x.clone()"),
        ("is a tensor of another kind ({keys})", "expected a plain, dense one", "Pass x.clone()"),
        ("input {position} has a tangent", "engines run inference only", "Pass forward_ad.unpack_dual(x).primal"),
    ],
    "src/anabranch/export/_snapshot.py": [
        (
            "the model ({type(x).__name__}) holds objects that are nested too deep",
            "expected fewer",
            "Move what forward()",
        ),
    ],
    "src/anabranch/generation/_decoder.py": [
        ("length={length} and batch={batch} given", "expected at least 1 each"),
        ("has an encoder, and no source is given", "expected an example of the encoder's input", "Pass source="),
        ("returns no past_key_values", "expected a model that keeps keys and values", "and compile that"),
        ("keeps a {type(layer).__name__}", "expected layers that keep keys and values", "and compile that"),
    ],
    "src/anabranch/generation/_tokens.py": [
        ("temperature={self.temperature} given", "expected more than 0", "Use greedy for none"),
        ("top_k={self.top_k} given", "expected at least 1, or None"),
        ("top_p={self.top_p} given", "expected more than 0 and at most 1"),
        ("a prompt of shape {list(prompt.shape)} given", "expected [batch, n] with at least one token"),
    ],
    "src/anabranch/models.py": [
        ("upscaler(channels={channels}, convs={convs}, scale={scale})", "scale must be at least 2"),
    ],
    "src/anabranch/plan/_plan.py": [
        ("buffer {self.name}: kind is {self.kind}", "expected one of {"),
        ("buffer {self.name}", "nbytes and offset must not be negative"),
        ("buffer names are not unique", "give each buffer a name of its own"),
        ("step names are not unique", "give each step a name of its own"),
        ("step {s.name}: lane {s.lane}", "is not one of {", "name one of them"),
        ("edge {e.before} -> {e.after}", "a wait must be issued after its record"),
        ("step {s.name}: buffer {a.buffer}", "is not in the plan", "add it"),
        ("edge {e.before} -> {e.after}: step {end}", "is not in the plan", "add it"),
    ],
    "src/anabranch/race/_command.py": [
        ("{trace}: cannot be read: {error.strerror}", "give a trace file, or - for standard input"),
        ("{trace}: has no events", "there is nothing to judge", "expected one JSON object a line"),
    ],
    "src/anabranch/race/_core/detector.cpp": [
        ("found an empty string", "expected a buffer's name"),
        ("found {}", 'expected "{}" to be {} in'),
        ("found {}", 'expected "do" to name an event'),
        ('found "{}"', 'expected "do" to be one of stream, alias, op'),
        ("found {}", 'expected either "on" (a stream or an event) or "device"'),
    ],
    "src/anabranch/race/_core/event.cpp": [
        ('found "{}" twice', "expected each field once"),
        ("found {} at column {}", "expected {}"),
    ],
    "src/anabranch/race/_core/order.cpp": [
        ("found {} streams and {} threads", "expected a trace whose clocks fit in 1 GiB"),
    ],
    "src/anabranch/race/_detector.py": [("{error}", "expected an event of plain JSON data")],
    "src/anabranch/runtime/_process.py": [
        ("was to be copied or pickled", "belongs to this process", "Compile the model where it is needed"),
        (
            "this process was forked while another thread of its parent compiled",
            "What was compiled before still runs",
            "Call engine.warm(...) for every",
        ),
    ],
    "src/anabranch/runtime/_core/program.cpp": [
        ("{} returned sizes {} and strides {}", "expected {} and {}", "Compile with dynamic=False"),
    ],
    "src/anabranch/runtime/_core/cuda.cpp": [
        (
            "the CUDA libraries of this process have no {}",
            "expected those that PyTorch needs",
            "Update the NVIDIA driver",
        ),
    ],
    "src/anabranch/runtime/_contexts.py": [
        ("this model cannot be captured: {why}", "cuda_graphs=True given", "Leave cuda_graphs out"),
    ],
    "src/anabranch/runtime/_builder.py": [
        ("does not run this model: {choice.why_eager}", "require_full=True given", "Leave require_full out"),
        ("and {why}: a fault of {choice.backend}", "require_full=True given", "Leave require_full out"),
        ("does not run on inputs like these ({", "Expected inputs that model(*inputs) runs on", "try that first"),
    ],
    "src/anabranch/runtime/_compiler.py": [
        ("flags changed since compile: {", "cannot be compiled under the engine's flags", "Set them back"),
        ("the model runs in eager on these inputs ({signature})", "its graph does not run", "Try another backend"),
        ("the model writes {min(taken)}", "compiled for what it held at first", "Compile for inputs first"),
    ],
    "src/anabranch/runtime/_direct.py": [
        ("numerics flags changed again and again", "set them once, before the calls"),
        ("what it wrote ({written})", "may be of other precision", "set them once, before the calls"),
        ("the model is {unit.program.direct_only}", "needs the host to look at results", "Call the engine outside"),
        ("an operator of the model {unit.program.direct_only}", "needs the host to wait", "Call the engine outside"),
        ("the model is {unit.program.direct_only}", "would keep the values of this call", "Call the engine outside"),
        (
            "no execution context of {self._backend} is left",
            "each captured graph keeps one",
            "call engine.warm(captures=N)",
        ),
        (
            "{self._backend} has to run on inputs of its shapes once before",
            "call engine.warm(inputs) with inputs of these shapes",
            "or compile with dynamic=False",
        ),
    ],
    "src/anabranch/dynamo.py": [("was given {given}", "expected options= with none but {")],
    "src/anabranch/runtime/_compile.py": [
        ("backend={backend} given", "expected None or one of {"),
        ("runtime={runtime} given", "expected 'auto'"),
        ("max_contexts={max_contexts} given", "expected at least 1"),
        ("memory_limit={memory_limit} given", "expected bytes, 0 or more, or None"),
        ("compile was called inside a CUDA graph capture", "compile first, then capture"),
    ],
    "src/anabranch/runtime/_engine.py": [
        ("its input signature was not compiled before", "cannot be done there", "Call engine.warm(...) first"),
        ("{self} was closed", "compile a new one"),
        ("the engine that this graph was a part of is gone", "compile a new one"),
        ("belongs to the parent of this forked process", "this process cannot use", "Compile in the child"),
        ("the device was lost earlier in this process: {lost}", "Start a new process"),
    ],
    "src/anabranch/runtime/_flags.py": [
        ("numerics flags changed since compile: {", "would not give the engine's bits", "Set them back"),
    ],
    "src/anabranch/runtime/_fragment.py": [
        ("grad is enabled", "engines run inference", "Call it under torch.no_grad()"),
    ],
    "src/anabranch/runtime/_guarded.py": [
        ("inside a CUDA graph capture", "Python runs between the graphs", "Call the engine outside the capture"),
        ("the model changes {names[0]} in place", "an engine is immutable", "Make it an output"),
        ("the model changes a tensor in place that it holds", "an engine is immutable", "Register it with"),
        ("the model changes {', '.join(changed)} in each call", "keeps no state of Python's", "Make it an input"),
    ],
    "src/anabranch/runtime/_given.py": [
        ("backend='tensorrt' given with inputs for CUDA", "PyTorch sees no GPU here", "anabranch build MODEL"),
        ("the model and its inputs are on the CPU", "expected them on a CUDA device", "anabranch build MODEL"),
        ("backend={given} given", "expected one of {"),
        ("inputs is a single {type(inputs).__name__}", "expected a list: inputs=[x]"),
        (
            "model is a {type(model).__name__}",
            "expected an nn.Module, a method of one, an exported program or the",
            "Call a function in the forward()",
        ),
        ("inputs on several devices given ({", "an engine runs on one", "Move them to one device"),
        ("{path}: cannot be loaded as an exported program", "Expected a file written by torch.export.save"),
        ("the model's {name} is on {t.device}", "its inputs are on {device}", "call model.to("),
        ("{dims[dim.name]} and {dim} given", "expected one name to have the same bounds everywhere"),
        ("the call is made under a {type(mode).__name__}", "engines run on real tensors", "Call the engine outside"),
    ],
    "src/anabranch/runtime/_padding.py": [
        ("pad_to was given for {names}", "cannot be given more rows than there are: {why}", "Leave pad_to out"),
    ],
    "src/anabranch/runtime/_ranges.py": [
        ("sizes were declared to vary ({names})", "the model does not let them: {why}", "Give numbers in their place"),
        ("size {d} of input {i} is {size}; {dim.name}", "declared as {dim.bounds}", "Pass inputs within the bounds"),
        ("and size {e} of input {other} is {equal}", "so they must be equal", "Give them two names"),
    ],
    "src/anabranch/runtime/_session.py": [
        ("{engine} was called itself", "keeps state ({names}), which is a session's", "make one with session"),
        ("{self} cannot be used any more", "make another one with engine.session()"),
        ("an earlier call of {self} failed", "half of one call's and half of another's", "Call session.reset(), or"),
        ("the session has no state {missing[0]} yet", "inside a CUDA graph capture", "Call session.reset() before"),
        ("a {type(state).__name__} was given", "expected a dict of tensors by name", "Pass what session.state gave"),
        ("state {name} {what}", "expected {"),
        ("state {name} is a {type(y).__name__}", "expected a tensor"),
        ("state {name} is {y.dtype} of shape", "expected {x.dtype} of shape"),
        ("{self} is full: its state {room.name} is {count}", "stays within its state up to", "Call session.reset()"),
        ("{self} was to be copied or pickled", "can be in one place only", "Use session.clone(), or save"),
        ("{self} is in use by another call", "its calls follow one another", "Use a session for each thread"),
        ("is looked at or changed inside a CUDA graph capture", "cannot be ordered", "Do that outside of the capture"),
    ],
    "src/anabranch/runtime/_unit.py": [
        ("{self.name_of(i)} and {self.name_of(j)} share memory", "the model writes into", "Pass tensors with memory"),
        ("{self.name_of(i)} is expanded", "the model writes into it", "Pass x.contiguous()"),
        ("elements into its storage", "the model reads from the storage's beginning ({what})", "Pass x.clone()"),
        (
            "no integer was found that this model takes for all of its integer inputs ({signature}): {why}",
            "Tried 0 to 16 and powers of two",
            "leave the part that does not out",
        ),
    ],
    "src/anabranch/sim/_core/backend.cpp": [
        ("querying an event that was recorded inside a capture", "record it again outside first"),
        ("synchronizing an event that was recorded inside a capture", "record it again outside first"),
        ("time is not modelled, so events measure none", "measure on a GPU"),
    ],
    "src/anabranch/sim/_core/bindings.cpp": [
        ("not on {}", "launch takes tensors on sim"),
        ("sim: launch", "takes tensors of one device"),
        ("capture mode {} given", "expected global, thread_local or relaxed"),
        ("policy {} given", "expected fifo, lazy or random"),
    ],
    "src/anabranch/sim/_core/capture.cpp": [
        ("the legacy default stream cannot be captured", "capture on a torch.Stream"),
        ("stream {} is under capture already", "end that capture first"),
        ("stream {} is not under capture", "begin one first"),
        ("the capture began on {}, not on {}", "end it there"),
        ("the capture was invalidated: {}", "begin it again without that"),
        ("the capture has unjoined work on {}", "make {} wait for it before the capture ends"),
        ("launching a graph inside a capture", "is not modelled", "launch it after the capture"),
    ],
    "src/anabranch/sim/_core/copy.cpp": [
        ("not {} to {}", "sim copies strided tensors only", "use x.to_dense()"),
        ("sim cannot copy between {} and {}", "copy to the CPU first"),
        ("not {}", "one element expected"),
    ],
    "src/anabranch/sim/_core/machine.cpp": [
        ("recorded inside a capture which has ended", "record it again"),
        ("the legacy default stream cannot enter a capture", "use a torch.Stream"),
        ("sim: {}", "expected events of one capture", "Record and wait in the same one"),
        ("sim: {} (on CUDA: error 905", "record it inside the capture"),
        ("device error in queued work: {}", "anabranch.sim.reset() clears it"),
    ],
    "src/anabranch/sim/_core/memory.cpp": [
        ("{} bytes asked for, {} of {} held", "free tensors", "raise anabranch.sim.core.limit"),
    ],
    "src/anabranch/sim/_core/random.cpp": [
        ("the state of a generator is 16 bytes on the CPU", "give what get_state() returned"),
        ("there is no device sim:{}", "expected 0 to {}"),
    ],
    "src/anabranch/sim/_core/threads.cpp": [
        ("there is no device sim:{}", "expected 0 to {}"),
        ("{} is not permitted while a stream is under capture", "do it before or after the capture"),
        ("{} is not permitted while one of its streams is under capture", "do it before or after the capture"),
        ("{} waited 60 s", "a latch which nobody opens", "open it in another thread"),
    ],
    "src/anabranch/sim/_core/views.cpp": [
        ("not {}", "sim has strided tensors only", "use torch.strided"),
        ("set_ of a tensor on {}", "with a storage on {}", "give a storage on the same device"),
        ("record_stream with a stream of {}", "give a stream of sim"),
    ],
    "src/anabranch/sim/_device.py": [
        (
            "queued work failed on the simulated device: {lost}",
            "raises DeviceLost",
            "until you call anabranch.sim.reset()",
        ),
    ],
    "src/anabranch/sim/_graph.py": [
        ("this graph was not captured", "use `with anabranch.sim.graph(g):` first"),
    ],
}
