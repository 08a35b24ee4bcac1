"""Makes clip.mp4: four photographs that ship inside scikit-image, panned and encoded as H.264.

Run once, by whoever wants to change the clip; nothing else in the project needs scikit-image:

    pip install scikit-image==0.25.2 av==17.1.0
    python examples/clip/make_clip.py
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import skimage.data
from skimage.transform import resize

WIDTH, HEIGHT = 320, 180
FRAMES_PER_SHOT = 12
FRAMES_PER_SECOND = 12

# Photograph, then the window's top left corner (x, y) and width, in pixels of the photograph, at the first and the last
# frame of the shot. The window keeps 16:9, so its height follows; a changing width is a zoom.
SHOTS = [
    ("astronaut", (10, 0, 480), (60, 60, 420)),
    ("chelsea", (20, 20, 400), (51, 60, 360)),
    ("coffee", (0, 20, 520), (70, 90, 500)),
    ("rocket", (60, 40, 560), (20, 0, 620)),
]


def frames():
    """Yield the clip's frames in order: ``(HEIGHT, WIDTH, 3)`` uint8 RGB."""
    for name, first, last in SHOTS:
        photo = getattr(skimage.data, name)()
        for step in range(FRAMES_PER_SHOT):
            x, y, width = np.round(np.interp(step, [0, FRAMES_PER_SHOT - 1], [0, 1]) * np.subtract(last, first) + first)
            height = round(width * HEIGHT / WIDTH)
            window = photo[int(y) : int(y) + height, int(x) : int(x + width)]
            assert window.shape[:2] == (height, int(width)), f"{name}: the window leaves the photograph"
            yield (resize(window, (HEIGHT, WIDTH), order=3, anti_aliasing=True) * 255).round().astype(np.uint8)


def main() -> None:
    path = Path(__file__).with_name("clip.mp4")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"crf": "16", "preset": "veryslow"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.time_base = Fraction(1, FRAMES_PER_SECOND)
        for picture in frames():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
