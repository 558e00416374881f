"""Still images as they are shown: the one place that opens an image file with Pillow for its pixels.

Orientation, transparency, bit depth and colour profile are applied here, so that the readers of folders, of
shards and of a first frame agree.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from svd_ds.small_files import read_regular

ORIENTATION = 0x0112
"""EXIF tag (CIPA DC-008, 4.6.5): how the stored rows and columns are to be shown."""
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FORMATS = ("JPEG", "JPEG2000", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Formats that are read. Pillow knows others that make it start a program (EPS), or open what they name."""
MAX_PIXELS = 89_478_485
"""Pixels a picture or frame: the limit at which Pillow warns of a decompression bomb, a quarter GiB of RGB. A
frame of 8K video has 33 million."""
HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
PHOTOMETRIC, WHITE_IS_ZERO = 0x0106, 0
"""TIFF tag, and its value where 0 is white."""
SRGB_GAMMA = 1 / 2.2
SAME_GAMMA = 0.05
"""Share by which a gAMA chunk may differ from sRGB's without a visible change."""
BACKGROUND = 255
"""Level of the white on which transparent pixels are shown, as browsers show them."""


class TooLargeError(ValueError):
    """A file claims frames of more pixels than it may have: it is not decoded."""


def too_large(height: int, width: int, max_pixels: int) -> TooLargeError:
    return TooLargeError(
        f"the file claims {height} x {width} pixels, and its frames may have {max_pixels}: it is not decoded"
    )


def is_still(content: bytes) -> bool:
    """Whether a file's first bytes are those of a JPEG, PNG or WebP image."""
    return content.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")) or (
        content[:4] == b"RIFF" and content[8:12] == b"WEBP"
    )


def read_still(source: Path | bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file as it is shown: uint8 sRGB, (H, W, 3).

    The EXIF orientation is applied, transparent pixels are composited on white, 16 bits a channel are scaled
    to 8, and an embedded colour profile is converted to sRGB. Of an animation the first frame is taken.

    Args:
        source: a path, or the file's bytes.
        max_pixels: of the image; a file that claims more is refused before anything is decoded.

    Raises:
        ValueError: the file is no image that can be read; the caller adds its name.
    """
    content = source if isinstance(source, bytes) else read_regular(source)
    try:
        with _opened(content) as image:
            if image.width * image.height > max_pixels:
                raise too_large(image.height, image.width, max_pixels)
            _mend_transparency(image)
            image.load()
            orientation = _orientation(image)
            shown = _to_srgb(_to_eight_bits(image))
        if orientation in TRANSPOSITIONS:
            shown = shown.transpose(TRANSPOSITIONS[orientation])
        return np.array(shown)
    except TooLargeError:
        raise
    # Pillow's decoders raise SyntaxError, struct.error, DecompressionBombError and others on damaged files.
    except Exception as error:
        raise ValueError(f"it cannot be read as an image ({_reason(error, content)})") from error


def _opened(content: bytes) -> Image.Image:
    with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
        return Image.open(io.BytesIO(content), formats=FORMATS)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:
        # A damaged EXIF block has no orientation; the pixels are still whole.
        return 1


def _mend_transparency(image: Image.Image) -> None:
    """Give the transparent colour of a PNG of 16 bits a channel in 8, as Pillow gives the pixels."""
    colour = image.info.get("transparency")
    if isinstance(colour, tuple) and any("RGB;16" in str(tile) for tile in getattr(image, "tile", ())):
        image.info["transparency"] = tuple(level >> 8 for level in colour)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """The image in a mode of 8 bits a channel: Pillow itself clips wider grey, and makes it white."""
    is_pgm = image.mode == "I" and image.format == "PPM"
    if not (image.mode.startswith("I;16") or is_pgm):
        if image.mode in ("I", "F"):
            raise ValueError(f"the range of its pixels, of mode {image.mode!r}, is not known")
        return image
    levels_HW = np.asarray(image).astype(np.uint32)
    if image.format == "TIFF" and image.getexif().get(PHOTOMETRIC) == WHITE_IS_ZERO:
        # Pillow inverts those of 8 bits only.
        levels_HW = 65535 - levels_HW
    grey = Image.fromarray(((levels_HW * 255 + 32767) // 65535).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(levels_HW == transparent, 0, 255).astype(np.uint8)))
    if profile := image.info.get("icc_profile"):
        grey.info["icc_profile"] = profile
    return grey


def _to_srgb(image: Image.Image) -> Image.Image:
    profile, gamma = image.info.get("icc_profile"), image.info.get("gamma", 0.0)
    alpha: Image.Image | None = None
    if image.has_transparency_data:
        # A grey profile fits grey alone, and no profile has anything to say of transparency.
        is_grey = image.mode in ("L", "LA", "La")
        image = image.convert("LA" if is_grey else "RGBA")
        alpha = image.getchannel("A")
        image = image.convert("L" if is_grey else "RGB")
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    if profile:
        image = _converted(image, profile)
    elif gamma and "srgb" not in image.info and abs(gamma / SRGB_GAMMA - 1) > SAME_GAMMA:
        image = _with_gamma(image.convert("RGB"), gamma)
    shown = image.convert("RGB")
    if alpha is not None:
        shown.putalpha(alpha)
        background = Image.new("RGBA", shown.size, (BACKGROUND, BACKGROUND, BACKGROUND, 255))
        shown = Image.alpha_composite(background, shown).convert("RGB")
    return shown


def _with_gamma(image: Image.Image, gamma: float) -> Image.Image:
    """RGB that a PNG's gAMA chunk says to be of another gamma than sRGB's, as browsers show it."""
    return image.point([round(255 * (level / 255) ** (SRGB_GAMMA / gamma)) for level in range(256)] * 3)


def _converted(image: Image.Image, profile: bytes) -> Image.Image:
    """The image in sRGB by its colour profile, or as it is where the profile does not fit it."""
    try:
        embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(embedded).startswith("sRGB"):
            return image
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, embedded, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image
    return converted or image


def _reason(error: Exception, content: bytes) -> str:
    if isinstance(error, UnidentifiedImageError):
        if content[4:8] == b"ftyp" and content[8:12] in HEIC:
            return "it is HEIC; convert it to JPEG or PNG"
        return f"it is none of {', '.join(FORMATS)}"
    return " ".join(str(error).split()) or type(error).__name__
