"""Still images are read as browsers show them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from svd_ds.data.decoding import decode
from svd_ds.pixels.frame import to_rgb
from svd_ds.pixels.still import ORIENTATION, TRANSPOSITIONS, is_still, read_still
from svd_ds.video import read_image


def picture(height: int = 24, width: int = 40) -> np.ndarray:
    """Image with four corners of different colours, uint8 RGB."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[: height // 2, : width // 2] = (220, 40, 40)
    pixels[: height // 2, width // 2 :] = (40, 220, 40)
    pixels[height // 2 :, : width // 2] = (40, 40, 220)
    pixels[height // 2 :, width // 2 :] = (220, 220, 40)
    return pixels


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def stored_as(upright: Image.Image, orientation: int) -> Image.Image:
    """Pixels as a camera stores them with this orientation."""
    inverse = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    transposition = inverse.get(orientation, TRANSPOSITIONS.get(orientation))
    return upright.transpose(transposition) if transposition is not None else upright


def largest_error(found: np.ndarray, wanted: np.ndarray) -> int:
    assert found.shape == wanted.shape and found.dtype == np.uint8
    return int(np.abs(found.astype(int) - wanted.astype(int)).max())


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {"quality": 100}), ("PNG", {}), ("WEBP", {"lossless": True})]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_by_every_reader(
    orientation: int, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    upright = picture()
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = saved(stored_as(Image.fromarray(upright), orientation), kind, exif=exif, **options)
    assert is_still(content)
    (frame,) = decode(content, [0])
    (tmp_path / "a").write_bytes(content)
    by_name = read_image(tmp_path / "a", *upright.shape[:2]).permute(1, 2, 0).numpy()
    for found in (read_still(content), to_rgb(frame).numpy(), by_name):
        # Away from the borders of colours, where JPEG rings.
        assert largest_error(found[3:9, 3:17], upright[3:9, 3:17]) <= 3
        assert largest_error(found[15:21, 24:37], upright[15:21, 24:37]) <= 3


def with_hidden_colours() -> Image.Image:
    """RGBA image whose left half is transparent noise, and whose right half is opaque."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 4)).astype(np.uint8)
    pixels[:, :16, 3], pixels[:, 16:, 3] = 0, 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (with_hidden_colours(), {}),
        (with_hidden_colours().convert("LA"), {}),
        (with_hidden_colours().quantize(16), {}),
        (with_hidden_colours(), {"kind": "WEBP", "lossless": True, "exact": True}),
    ],
    ids=["RGBA", "LA", "palette", "WebP"],
)
def test_transparent_pixels_are_shown_on_white(image: Image.Image, options: dict[str, Any]) -> None:
    shown = read_still(saved(image, **options))
    assert (shown[:, :16] == 255).all(), "hidden colours do not show"
    assert shown[:, 16:].std() > 20, "what is opaque stays"


def test_half_transparent_pixels_are_blended() -> None:
    image = Image.new("RGBA", (8, 8), (200, 0, 100, 128))
    assert largest_error(read_still(saved(image)), np.full((8, 8, 3), (227, 127, 177), np.uint8)) <= 1


def test_transparent_colour_is_shown_on_white() -> None:
    image = Image.fromarray(picture())
    shown = read_still(saved(image, transparency=(220, 40, 40)))
    assert (shown[:12, :20] == 255).all() and (shown[12:, 20:] == (220, 220, 40)).all()


def png16(samples: np.ndarray) -> bytes:
    """Encode a 16-bit PNG, grey (H, W) or RGB (H, W, 3), which Pillow cannot write in colour."""

    height, width = samples.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if samples.ndim == 2 else 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("channels", [(), (3,)], ids=["grey", "RGB"])
def test_sixteen_bits_are_scaled_and_not_clipped(channels: tuple[int, ...]) -> None:
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16)
    samples = np.broadcast_to(ramp[None, :].reshape(1, 64, *([1] * len(channels))), (8, 64, *channels))
    shown = read_still(png16(np.ascontiguousarray(samples)))
    wanted = np.broadcast_to((ramp / 257).round()[None, :, None], (8, 64, 3)).astype(np.uint8)
    assert largest_error(shown, wanted) <= 1


def test_16_bit_tiff_and_pgm_are_scaled(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.linspace(0, 65535, 32).astype(np.uint16), (4, 32))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "a.tiff")
    (tmp_path / "a.pgm").write_bytes(b"P5 32 4 65535\n" + ramp.astype(">u2").tobytes())
    for name in ("a.tiff", "a.pgm"):
        assert largest_error(read_still(tmp_path / name)[..., 0], (ramp / 257).astype(np.uint8)) <= 1


@pytest.mark.parametrize("photometric", [0, 1], ids=["white is 0", "black is 0"])
def test_photometric_tag_of_a_16_bit_tiff_is_applied(photometric: int) -> None:
    ramp = np.broadcast_to(np.linspace(0, 65535, 32).astype(np.uint16), (4, 32))
    content = bytearray(saved(Image.fromarray(np.ascontiguousarray(ramp)), "TIFF"))
    place = content.index(struct.pack("<HHI", 262, 3, 1)) + 8
    content[place : place + 2] = struct.pack("<H", photometric)
    wanted = (ramp / 257).round()
    assert (
        largest_error(
            read_still(bytes(content))[..., 0], (wanted if photometric else 255 - wanted).astype(np.uint8)
        )
        <= 1
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(content: bytes, kind: bytes, data: bytes) -> bytes:
    """Insert a chunk before the pixels of a PNG."""
    place = content.index(b"IDAT") - 4
    return content[:place] + chunk(kind, data) + content[place:]


def test_transparent_colour_of_16_bits_is_shown_on_white() -> None:
    samples = np.full((4, 8, 3), 40_000, np.uint16)
    samples[:, :4] = (300, 20_000, 60_000)
    content = with_chunk(png16(samples), b"tRNS", struct.pack(">HHH", 300, 20_000, 60_000))
    shown = read_still(content)
    assert (shown[:, :4] == 255).all() and largest_error(shown[:, 4:], np.full((4, 4, 3), 156, np.uint8)) <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_gamma_of_a_png_is_applied(mode: str) -> None:
    """Browsers convert a linear image (gAMA 1.0) to the gamma of a display."""
    image = Image.fromarray(picture()).convert(mode)
    plain = saved(image)
    stored = read_still(plain)
    linear = read_still(with_chunk(plain, b"gAMA", struct.pack(">I", 100_000)))
    wanted = 255 * (stored.astype(np.float64) / 255) ** (1 / 2.2)
    assert largest_error(linear, wanted.round().astype(np.uint8)) <= 1
    usual = with_chunk(plain, b"gAMA", struct.pack(">I", 45_455))
    assert largest_error(read_still(usual), stored) == 0
    srgb = with_chunk(with_chunk(plain, b"sRGB", b"\0"), b"gAMA", struct.pack(">I", 100_000))
    assert largest_error(read_still(srgb), stored) == 0, "sRGB counts before gAMA"


def lab() -> Image.Image:
    srgb, space = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(Image.fromarray(picture()), srgb, space, outputMode="LAB")
    assert converted is not None
    return converted


def premultiplied() -> bytes:
    """Encode a TIFF of half-transparent pixels with premultiplied alpha."""
    pixels = np.dstack([picture().astype(int) * 128 // 255, np.full((24, 40), 128)]).astype(np.uint8)
    content = bytearray(saved(Image.fromarray(pixels), "TIFF"))
    place = content.index(struct.pack("<HHI", 338, 3, 1)) + 8
    content[place : place + 2] = struct.pack("<H", 1)
    return bytes(content)


PHOTO = Image.fromarray(picture())
ON_WHITE = ((picture().astype(int) * 128 + 255 * 127 + 127) // 255).astype(np.uint8)
FURTHER = {
    "Lab": (saved(lab(), "TIFF"), picture(), 5),
    "YCbCr": (saved(PHOTO.convert("YCbCr"), "TIFF"), picture(), 4),
    "CMYK TIFF": (saved(PHOTO.convert("CMYK"), "TIFF"), picture(), 1),
    "1 bit": (saved(PHOTO.convert("1")), np.array(PHOTO.convert("1").convert("RGB")), 0),
    "half-transparent TIFF": (
        saved(Image.fromarray(np.dstack([picture(), np.full((24, 40), 128, np.uint8)])), "TIFF"),
        ON_WHITE,
        1,
    ),
    "premultiplied TIFF": (premultiplied(), ON_WHITE, 2),
    "progressive": (saved(PHOTO, "JPEG", quality=100, subsampling=0, progressive=True), picture(), 3),
    "MPO": (
        saved(PHOTO, "MPO", save_all=True, append_images=[PHOTO.rotate(180)], quality=100, subsampling=0),
        picture(),
        3,
    ),
    **{
        f"animated {kind}": (
            saved(PHOTO, kind, save_all=True, append_images=[PHOTO.rotate(180)], **options),
            picture(),
            0,
        )
        for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {}))
    },
}


@pytest.mark.parametrize("kind", FURTHER)
def test_further_formats_and_modes_are_read(kind: str) -> None:
    content, wanted, tolerance = FURTHER[kind]
    assert largest_error(read_still(content), wanted) <= tolerance


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="the range of its pixels, of mode 'F', is not known"):
        read_still(tmp_path / "a.tiff")


def test_cmyk_and_grey_become_rgb() -> None:
    upright = Image.fromarray(picture())
    shown = read_still(saved(upright.convert("CMYK"), "JPEG", quality=100))
    assert largest_error(shown[3:9, 3:17], picture()[3:9, 3:17]) <= 6
    assert (
        largest_error(read_still(saved(upright.convert("L"))), np.array(upright.convert("L").convert("RGB")))
        == 0
    )


def test_embedded_profile_is_converted_to_srgb() -> None:
    image = Image.fromarray(picture())
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # Another RGB space: sRGB whose red and green primaries have changed places.
    swapped = srgb.replace(b"rXYZ", b"temp").replace(b"gXYZ", b"rXYZ").replace(b"temp", b"gXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    assert largest_error(read_still(saved(image, icc_profile=srgb)), picture()) == 0
    assert largest_error(read_still(saved(image, icc_profile=swapped)), picture()[..., [1, 0, 2]]) <= 3
    assert largest_error(read_still(saved(image, icc_profile=b"no profile")), picture()) == 0


def test_grey_profile_is_applied_with_transparency() -> None:
    grey = picture()[..., 0]
    # The RGB profile of sRGB as one of a grey space with a linear curve.
    curve = b"curv" + bytes(8)
    tags = {b"wtpt": b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061), b"kTRC": curve}
    head, body = bytearray(128), b""
    head[8:12], head[12:24], head[36:40] = b"\x02\x10\x00\x00", b"mntrGRAYXYZ ", b"acsp"
    head[68:80] = struct.pack(">3i", 63190, 65536, 54061)
    table, place = struct.pack(">I", len(tags)), 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, place + len(body), len(content))
        body += content
    head[0:4] = struct.pack(">I", place + len(body))
    profile = bytes(head) + table + body
    opaque = read_still(saved(Image.fromarray(grey), icc_profile=profile))
    assert largest_error(opaque, np.repeat(grey[..., None], 3, axis=-1)) > 20, "a linear grey is brighter"
    image = Image.merge("LA", (Image.fromarray(grey), Image.new("L", grey.shape[::-1], 255)))
    image.putpixel((0, 0), (0, 0))
    shown = read_still(saved(image, icc_profile=profile))
    assert shown[0, 0].tolist() == [255, 255, 255]
    assert largest_error(shown[1:], opaque[1:]) <= 1


def damaged_png() -> bytes:
    content = saved(Image.fromarray(picture()))
    place = content.index(b"IDAT")
    return content[:place] + b"\x00\x01\x02\x03" + content[place + 4 :]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"<html>",
        damaged_png(),
        saved(Image.fromarray(picture()))[:60],
        b"\xff\xd8\xff" + bytes(99),
    ],
    ids=["empty", "text", "html", "bad chunk", "cut short", "zeros"],
)
def test_damaged_image_is_a_value_error(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read as an image"):
        read_still(content)
    (tmp_path / "odd.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"odd\.png is not an image"):
        read_image(tmp_path / "odd.png", 8, 8)


def test_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"cannot be read as an image .*decompression bomb"):
        read_still(saved(Image.fromarray(picture())))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_image_with_damaged_exif_block_is_read() -> None:
    content = saved(Image.fromarray(picture()), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert largest_error(read_still(content), picture()) == 0
