"""Image grids: every pixel where it belongs, and prompts that travel with the file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from densegrpo_fast.run_files.grids import read_captions, read_grid
from densegrpo_fast.run_files.images import read_picture, save_grid, save_picture

COLOURS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]])


@pytest.fixture
def pictures():
    return COLOURS[:, :, None, None].expand(5, 3, 16, 24).clone()


def test_pictures_stand_in_reading_order_and_keep_their_pixels(pictures, tmp_path):
    generator = torch.Generator().manual_seed(0)
    pictures[4] = torch.rand(3, 16, 24, generator=generator)
    path = save_grid(pictures, tmp_path / "new" / "grid.png", columns=3, scale=2)
    grid = np.asarray(Image.open(path))
    # three columns of 48 and two rows of 32 pixels, with gaps of 6 between and around
    assert grid.shape == (2 * 32 + 3 * 6, 3 * 48 + 4 * 6, 3)
    for index in range(5):
        y, x = 6 + index // 3 * 38, 6 + index % 3 * 54
        expected = (pictures[index] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(grid[y : y + 32, x : x + 48], expected.repeat(2, 0).repeat(2, 1))
    assert (grid[44:76, 114:162] == 255).all(), "the empty sixth place is paper"
    again = [np.asarray(picture) for picture in read_grid(path)]
    np.testing.assert_array_equal(again, (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


def test_captions_are_drawn_below_and_stored_in_the_file(pictures, tmp_path):
    captions = ["a red circle to the left of a blue square", "<b>ü</b> 日本", "", "two crosses", "x" * 60]
    plain = Image.open(save_grid(pictures, tmp_path / "plain.png", columns=5))
    path = save_grid(pictures, tmp_path / "captions.png", columns=5, captions=captions)
    grid = np.asarray(Image.open(path))
    assert grid.shape[1] == plain.width and grid.shape[0] > plain.height
    assert (grid[6 + 32 : -6, 6:54] < 128).any(), "the first caption left ink below its picture"
    assert (grid[6 + 32 :, 6 + 2 * 54 : 6 + 2 * 54 + 48] == 255).all(), "an empty caption leaves none"
    assert read_captions(path) == captions
    assert read_captions(tmp_path / "plain.png") == []


def test_out_of_range_values_are_clamped_and_one_row_is_no_wider_than_its_pictures(pictures, tmp_path):
    path = save_grid(pictures[:2].bfloat16() * 3 - 1, tmp_path / "grid.png", columns=8, scale=1)
    grid = np.asarray(Image.open(path))
    assert grid.shape == (16 + 2 * 6, 2 * 24 + 3 * 6, 3)
    assert grid[10, 10].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.zeros(0, 3, 4, 4)}, r"\[N, 3, H, W\] with N >= 1, got \[0, 3, 4, 4\]"),
        ({"images": torch.zeros(2, 1, 4, 4)}, r"got \[2, 1, 4, 4\]"),
        ({"columns": 0}, "columns and scale must be at least 1, got 0 and 2"),
        ({"captions": ["one"]}, "captions must hold 5 texts, one per image, got 1"),
    ],
)
def test_bad_input_is_refused(pictures, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        save_grid(**({"images": pictures, "path": tmp_path / "grid.png", "columns": 2} | arguments))


def test_a_picture_reads_back_with_its_texts(tmp_path):
    image = torch.tensor([0.0, 51.2, 255.0]).div(255).view(3, 1, 1).expand(3, 4, 6)
    save_picture(image * 1.0, tmp_path / "one.png", {"prompt": "ein Würfel, 日本", "seed": "7"})
    again, texts = read_picture(tmp_path / "one.png")
    assert texts == {"prompt": "ein Würfel, 日本", "seed": "7"}
    # 51.2 is stored as 51
    torch.testing.assert_close(again, torch.tensor([0.0, 51 / 255, 1.0]).view(3, 1, 1).expand(3, 4, 6))


def test_other_kinds_of_pictures_are_read_as_colour_on_white(tmp_path):
    Image.new("L", (2, 2), 51).save(tmp_path / "grey.jpg", quality=100)
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    grey, clear = (read_picture(tmp_path / name)[0] for name in ("grey.jpg", "clear.png"))
    torch.testing.assert_close(grey, torch.full((3, 2, 2), 0.2), atol=0.01, rtol=0)
    assert torch.equal(clear, torch.ones(3, 2, 2))


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    save_picture(torch.rand(3, 40, 40), tmp_path / "cut.png", {})
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    for name in ("text.png", "cut.png", "absent.png"):
        with pytest.raises(OSError):
            read_picture(tmp_path / name)
