"""Decoding images: every mode of pixel, EXIF orientations, and what cannot be decoded."""

import struct

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import TiffImageFile

from sim_m2f.data.image import LIMITS, check_header, image_size, read_image
from sim_m2f.errors import UserError

HEIGHT, WIDTH = 24, 36


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def save(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_rgb(tmp_path, pixels):
    path = save(tmp_path, Image.fromarray(pixels))
    np.testing.assert_array_equal(read_image(path, HEIGHT, WIDTH), pixels)


def test_alpha_is_dropped(tmp_path, pixels):
    alpha = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 1), dtype=np.uint8)
    path = save(tmp_path, Image.fromarray(np.concatenate([pixels, alpha], axis=2)))
    np.testing.assert_array_equal(read_image(path, HEIGHT, WIDTH), pixels)
    path = save(tmp_path, Image.fromarray(np.concatenate([pixels[..., :1], alpha], axis=2), "LA"))
    np.testing.assert_array_equal(read_image(path, HEIGHT, WIDTH), pixels[..., :1].repeat(3, axis=2))


def test_grey_and_black_and_white(tmp_path, pixels):
    grey = pixels[..., 0]
    path = save(tmp_path, Image.fromarray(grey))
    np.testing.assert_array_equal(read_image(path, HEIGHT, WIDTH), np.stack([grey] * 3, axis=2))
    path = save(tmp_path, Image.fromarray(grey > 127))
    np.testing.assert_array_equal(read_image(path, HEIGHT, WIDTH), np.stack([(grey > 127) * 255] * 3, axis=2))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (WIDTH, HEIGHT), (HEIGHT, HEIGHT)])
def test_a_header_is_accepted_when_the_image_is(tmp_path, pixels, name, orientation, size):
    exif = Image.Exif()
    if orientation:
        exif[ExifTags.Base.Orientation] = orientation
    path = save(tmp_path, Image.fromarray(pixels), name, exif=exif)
    said = []
    for check in (read_image, check_header):
        try:
            check(path, *size, LIMITS)
            said.append(None)
        except UserError as error:
            said.append(str(error))
    assert said[0] == said[1]
    assert image_size(path, LIMITS) == read_image(path).shape[1::-1]


@pytest.mark.parametrize("lying", [False, True])
def test_the_size_of_a_lying_tiff_is_that_of_every_pillow(tmp_path, pixels, monkeypatch, lying):
    """Before it is decoded, newer ones have it upright and older ones as it is stored."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = save(tmp_path, Image.fromarray(pixels), "a.tif", exif=exif)
    told = (WIDTH, HEIGHT) if lying else (HEIGHT, WIDTH)
    monkeypatch.setattr(TiffImageFile, "size", told)
    assert image_size(path, LIMITS) == (HEIGHT, WIDTH)
    check_header(path, WIDTH, HEIGHT, LIMITS)
    with pytest.raises(UserError, match="is 24 x 36 pixels, but 36 x 24"):
        check_header(path, HEIGHT, WIDTH, LIMITS)


def test_a_header_is_read_without_the_pixels(tmp_path, pixels):
    path = save(tmp_path, Image.fromarray(pixels))
    path.write_bytes(path.read_bytes()[:-100])
    check_header(path, HEIGHT, WIDTH, LIMITS)
    path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a\.png: cannot be decoded \(not an image\)"):
        check_header(path, HEIGHT, WIDTH, LIMITS)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name):
    deep = np.linspace(0, 65535, HEIGHT * WIDTH).round().astype(np.uint16).reshape(HEIGHT, WIDTH)
    path = save(tmp_path, Image.fromarray(deep), name)
    expected = np.rint(deep.astype(np.float64) / 65535 * 255)
    read = read_image(path, HEIGHT, WIDTH)
    for channel in range(3):
        np.testing.assert_array_equal(read[..., channel], expected)


@pytest.mark.parametrize(("bits", "order"), [(12, "<"), (12, ">"), (16, "<"), (16, ">")])
def test_colours_of_16_bits_in_a_tiff_are_never_nearly_black(tmp_path, bits, order):
    """A file of one strip, by the definition of TIFF 6: Pillow writes no such colours."""
    values = np.random.default_rng(0).integers(0, 2**bits, (40, 60, 3))
    data = values.astype(f"{order}u2").tobytes()
    tags = [(256, 60), (257, 40), (258, 8 + len(data)), (259, 1), (262, 2), (273, 8), (277, 3), (278, 40)]
    tags += [(279, len(data)), (284, 1)]
    counts = {258: 3}
    entries = b"".join(
        struct.pack(f"{order}HHII", tag, 3 if tag == 258 else 4, counts.get(tag, 1), value)
        for tag, value in tags
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 14 + len(data))
    listed = struct.pack(f"{order}3HH", 16, 16, 16, len(tags)) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(head + data + listed)
    if bits == 16:
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), values >> 8)
        return
    with pytest.raises(UserError, match=r"a\.tif: .*16-bit colours of a TIFF.*convert it to PNG") as error:
        read_image(tmp_path / "a.tif")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))])
def test_palette(tmp_path, transparency):
    generator = np.random.default_rng(0)
    palette = generator.integers(0, 256, (256, 3), dtype=np.uint8)
    index = generator.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    image = Image.fromarray(index, "P")
    image.putpalette(palette.tobytes())
    path = save(tmp_path, image, **({} if transparency is None else {"transparency": transparency}))
    np.testing.assert_array_equal(read_image(path, HEIGHT, WIDTH), palette[index])


def test_cmyk(tmp_path):
    inks = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    inks[:, : WIDTH // 2] = [255, 0, 0, 0]  # cyan: no red
    inks[:, WIDTH // 2 :] = [0, 0, 0, 128]  # black at half strength: grey
    path = save(tmp_path, Image.fromarray(inks, "CMYK"), "a.tif")
    read = read_image(path, HEIGHT, WIDTH)
    np.testing.assert_array_equal(read[0, 0], [0, 255, 255])
    np.testing.assert_array_equal(read[0, -1], [127, 127, 127])


# EXIF orientation -> how a viewer shows the stored pixels (EXIF 2.32, tag 0x0112).
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_when_the_size_then_fits(tmp_path, pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, Image.fromarray(pixels), exif=exif)
    upright = UPRIGHT[orientation](pixels)
    np.testing.assert_array_equal(read_image(path, *upright.shape[:2]), upright)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_the_stored_orientation_is_kept_when_only_that_one_fits(tmp_path, pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, Image.fromarray(pixels), exif=exif)
    np.testing.assert_array_equal(read_image(path, HEIGHT, WIDTH), pixels)


def test_square_images_are_turned(tmp_path, pixels):
    exif = Image.Exif()
    exif[0x0112] = 6
    square = pixels[:, :HEIGHT]
    path = save(tmp_path, Image.fromarray(square), exif=exif)
    np.testing.assert_array_equal(read_image(path, HEIGHT, HEIGHT), np.rot90(square, -1))


def test_broken_exif_is_ignored(tmp_path, pixels):
    path = save(tmp_path, Image.fromarray(pixels), "a.jpg", exif=b"Exif\0\0garbage", quality=95)
    assert read_image(path, HEIGHT, WIDTH).shape == (HEIGHT, WIDTH, 3)


def test_another_size_is_told_with_both_sizes(tmp_path, pixels):
    path = save(tmp_path, Image.fromarray(pixels))
    with pytest.raises(UserError, match=r"a\.png: is 36 x 24 pixels, but 30 x 24 in the JSON"):
        read_image(path, HEIGHT, 30)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tif", "a.webp"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9])
def test_truncated_files_are_one_line(tmp_path, pixels, name, share):
    path = save(tmp_path, Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)), name)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=f"{name}: cannot be decoded") as error:
        read_image(path, HEIGHT * 8, WIDTH * 8)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("values", [np.float32([[0.5, 1.0]]), np.int32([[0, 70000]])])
def test_grey_without_a_known_range_is_refused(tmp_path, values):
    path = save(tmp_path, Image.fromarray(values), "a.tif")
    with pytest.raises(UserError, match="no known range; convert it"):
        read_image(path, 1, 2)
