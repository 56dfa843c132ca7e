"""Maps as pictures for people: scaled one by one, which is right for looking and wrong for comparing magnitudes."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import colormaps, font_manager
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

Picture = NDArray[np.uint8]
# Names of classes may be in any script; those of these fonts that are there fill in what DejaVu lacks.
_FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans",
          "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Noto Sans Arabic", "Noto Sans Devanagari")  # fmt: skip


def scale(heat: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return a map for showing: rectified, then its least value at 0 and its 99.5th percentile at 1.

    A constant map gives 0.
    """
    positive = np.maximum(np.asarray(heat, dtype=np.float64), 0.0)
    low, top = float(positive.min()), float(np.percentile(positive, 99.5))
    if top == low:  # fewer bright pixels than the percentile leaves out
        top = float(positive.max())
    return np.clip((positive - low) / (top - low), 0.0, 1.0) if top > low else np.zeros_like(positive)


def heatmap(heat: NDArray[np.floating], size: int = 128) -> Picture:
    """Return a map (H, W) as colours, uint8 (size, size, 3), dark to bright."""
    resized = Image.fromarray(scale(heat).astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR)
    colours = colormaps["inferno"](np.asarray(resized, dtype=np.float64))[..., :3]
    return np.asarray((colours * 255).round(), dtype=np.uint8)


def overlay(image: Picture, heat: NDArray[np.floating], size: int = 128) -> Picture:
    """Return a picture (H, W, 3) in grey with a map (h, w) laid over it in colours, half of each.

    Colours are those of :func:`heatmap`, and tell the map even where the picture is dark. uint8 (size, size, 3).
    """
    grey = Image.fromarray(image).convert("L").resize((size, size), Image.Resampling.BICUBIC)
    blended = (np.asarray(grey, dtype=np.float64)[..., None] + heatmap(heat, size)) / 2
    return np.asarray(blended.round(), dtype=np.uint8)


@contextlib.contextmanager
def any_script() -> Iterator[None]:
    """Draw and save figures whose text may be in any script; what no font here has is a box, without a warning."""
    there = set(font_manager.get_font_names())
    with matplotlib.rc_context({"font.family": [name for name in _FONTS if name in there]}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


@any_script()
def save_explanation(
    file: Path,
    image: Picture,
    saliency: NDArray[np.floating],
    cam: NDArray[np.floating],
    class_names: Sequence[str],
    probabilities: NDArray[np.floating],
) -> None:
    """Write one picture's explanation as a PNG: picture, saliency, Grad-CAM, overlay, and the likeliest classes.

    Args:
        file: where to write.
        image: (H, W, 3) uint8, as the network saw it.
        saliency: (H, W).
        cam: (h, w), of any resolution.
        class_names: C names.
        probabilities: (C,) in [0, 1].
    """
    figure = Figure(figsize=(10.5, 2.6), dpi=120, layout="constrained")
    axes = figure.subplots(1, 5, width_ratios=[1, 1, 1, 1, 1.3])
    size = 192
    shown = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST))
    pictures = [shown, heatmap(saliency, size), heatmap(cam, size), overlay(image, cam, size)]
    titles = ["as the network sees it", "saliency", "Grad-CAM", "Grad-CAM overlaid"]
    for axis, picture, title in zip(axes, pictures, titles, strict=False):
        axis.imshow(picture)
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    best = np.argsort(probabilities)[::-1][:5]
    bars = axes[-1]
    bars.barh(range(len(best)), probabilities[best], color="#4c72b0", height=0.35, align="edge")
    for row, index in enumerate(best):
        name = class_names[index] if len(class_names[index]) <= 28 else class_names[index][:27] + "…"
        bars.text(
            0.0, row - 0.08, f"{name}  {100 * probabilities[index]:.1f} %", fontsize=9, va="bottom", parse_math=False
        )
    bars.set_ylim(len(best) - 0.4, -0.6)
    bars.set_xlim(0, 1)
    bars.set_axis_off()
    bars.set_title("prediction", fontsize=9)
    figure.savefig(file)
