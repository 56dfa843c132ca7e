import numpy as np
import pytest
from PIL import Image

from explain import heatmap, overlay, render, save_explanation
from explain.render import scale

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)


def hot_spot(size: int = 32) -> np.ndarray:
    """A map that is 1 in its upper left quarter, else 0."""
    heat = np.zeros((size, size), dtype=np.float32)
    heat[: size // 2, : size // 2] = 1
    return heat


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0, 1e-12])
def test_a_constant_map_is_scaled_to_zero(value):
    assert not scale(np.full((4, 4), value)).any()


def test_negative_values_count_as_zero():
    assert scale(np.array([[-5.0, 0.0], [1.0, 2.0]])).tolist()[0] == [0.0, 0.0]
    assert not scale(-RNG.random((4, 4))).any()
    heat = RNG.normal(size=(8, 8))
    assert np.array_equal(scale(heat), scale(heat.clip(min=0)))


def test_scale_runs_from_the_least_value_to_the_top_percentile():
    heat = np.arange(1.0, 1002.0).reshape(7, 143)  # 1 to 1001: the 99.5th percentile is 996
    scaled = scale(heat)
    assert scaled[0, 0] == 0
    assert scaled.max() == 1
    assert (scaled == 1).sum() == 6
    assert scaled.ravel()[200] == pytest.approx(200 / 995)
    assert np.array_equal(scaled, scale(heat * 4))


def test_a_single_bright_pixel_is_shown():
    heat = np.zeros((32, 32))
    heat[5, 7] = 1.0
    scaled = scale(heat)
    assert scaled[5, 7] == 1
    assert scaled.sum() == 1


@pytest.mark.parametrize("shape", [(32, 32), (4, 4), (1, 1), (7, 13)])
@pytest.mark.parametrize("size", [16, 128])
def test_pictures_have_the_size_asked_for(shape, size):
    heat = RNG.normal(size=shape).astype(np.float32)
    for picture in (heatmap(heat, size), overlay(PICTURE, heat, size), overlay(PICTURE[:20], heat, size)):
        assert picture.shape == (size, size, 3)
        assert picture.dtype == np.uint8


def test_heatmap_runs_from_dark_to_bright():
    picture = heatmap(hot_spot(), 64).astype(int).sum(2)
    assert picture[:24, :24].min() > 600  # of 765
    assert picture[40:, 40:].max() < 10
    ramp = heatmap(np.linspace(0, 1, 64)[None].repeat(64, 0), 64).astype(int).sum(2)[32]
    assert (np.diff(ramp) >= 0).all()


@pytest.mark.parametrize("brightness", [0, 100, 255])
def test_overlay_tells_the_hot_spot_whatever_the_picture(brightness):
    flat = np.full((32, 32, 3), brightness, dtype=np.uint8)
    shown = overlay(flat, hot_spot(), 64).astype(int)
    assert (shown[:24, :24] - shown[40:, 40:].mean((0, 1)))[..., :2].min() > 110  # yellow, of 127
    assert np.ptp(shown[40:, 40:], axis=2).max() <= 3  # grey


def test_overlay_of_nothing_is_the_picture_dark_and_grey():
    dark = overlay(PICTURE, np.zeros((4, 4)), 32).astype(int)
    expected = np.asarray(Image.fromarray(PICTURE).convert("L")).astype(int)
    assert abs(dark - expected[..., None] / 2).max() <= 3


@pytest.mark.parametrize(
    ("names", "probabilities", "shown"),
    [
        (["cat", "dog"], [0.25, 0.75], ["dog  75.0 %", "cat  25.0 %"]),
        (["猫", "ꙮ"], [0.9, 0.1], ["猫  90.0 %", "ꙮ  10.0 %"]),
        (["$x^2$", "<script>"], [0.9, 0.1], ["$x^2$  90.0 %", "<script>  10.0 %"]),
        (["n" * 300, "$", "a_b%\\"], [0.5, 0.3, 0.2], ["n" * 27 + "…  50.0 %", "$  30.0 %", "a_b%\\  20.0 %"]),
        (
            [f"class {i}" for i in range(7)],
            [0.1, 0.3, 0.05, 0.2, 0.15, 0.12, 0.08],
            ["class 1  30.0 %", "class 3  20.0 %", "class 4  15.0 %", "class 5  12.0 %", "class 0  10.0 %"],
        ),
    ],
)
def test_save_explanation_writes_maps_and_the_likeliest_classes(tmp_path, monkeypatch, names, probabilities, shown):
    made = []
    original = render.Figure
    monkeypatch.setattr(render, "Figure", lambda *a, **k: made.append(original(*a, **k)) or made[-1])
    file = tmp_path / "map.png"
    save_explanation(file, PICTURE, hot_spot(), hot_spot(4) - 0.5, names, np.array(probabilities))
    with Image.open(file) as png:
        assert png.format == "PNG"
        assert png.size == (1260, 312)
        assert np.asarray(png.convert("L")).std() > 20
    *pictures, bars = made[0].axes
    assert [axis.get_title() for axis in pictures][1:3] == ["saliency", "Grad-CAM"]
    assert np.array_equal(pictures[1].images[0].get_array(), heatmap(hot_spot(), 192))
    assert [text.get_text() for text in bars.texts] == shown
    assert not any(text.get_parse_math() for text in bars.texts)
    assert [bar.get_width() for bar in bars.patches] == sorted(probabilities, reverse=True)[:5]
