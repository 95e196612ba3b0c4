"""Images of prompts and pairs: what one may be, how it is opened and checked, and how a run keeps the ones it used.

Pillow is imported only where an image is touched: who has none needs none.
"""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeneuron.errors import InputError, did_you_mean
from safeneuron.runtime.files import write_bytes

if TYPE_CHECKING:
    from PIL import Image


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""What the files of a folder of images may end in."""

IMAGES_FOLDER = "images"
"""Where a run keeps the images it used, beside the records that name them."""


def opened(image: Any, where: str = "") -> Image.Image:
    """The image in memory, upright and in RGB; what is transparent in it is white.

    Args:
        image: The path of a file, the bytes of one, or an image of Pillow.
        where: The place that names it, such as ``FILE line 3``, for the error.

    Returns:
        The image, loaded whole.

    Raises:
        InputError: For a file that is missing or no image, and without Pillow; it begins with ``where``.
    """
    pillow_image, prefix = pillow(), f"{where}: " if where else ""
    source = BytesIO(image) if isinstance(image, bytes) else image
    if isinstance(source, str | Path):
        source = _existing(Path(source).expanduser(), prefix)
    try:
        loaded: Image.Image = source if isinstance(source, pillow_image.Image) else pillow_image.open(source)
        loaded.load()
    # What Pillow raises for files that are no images, are cut off, or are far too large.
    except (OSError, SyntaxError, ValueError, pillow_image.DecompressionBombError) as error:
        raise InputError(
            f"{prefix}{name_of(image)} cannot be opened as an image ({_first_line(error)}); give a whole PNG, JPEG "
            "or WebP file"
        ) from error
    return _plain(loaded)


def _plain(image: Image.Image) -> Image.Image:
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    layer = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def pillow() -> Any:
    """Pillow's module ``Image``. Raises ``InputError`` where it is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(
            f"prompts with images need Pillow, which cannot be loaded ({error}); install it with: pip install "
            "'safeneuron[vision]'"
        ) from error
    return Image


def name_of(image: Any) -> str:
    """What messages and reports call an image: the name of its file, or ``an image`` if it has none."""
    if isinstance(image, str | Path):
        return Path(image).name
    return Path(str(getattr(image, "filename", ""))).name or "an image"


def digest_of(image: Any) -> str:
    """Sixteen hexadecimal digits that two images share if their files, or their pixels, are the same; "" for none."""
    if image is None:
        return ""
    if isinstance(image, bytes | str | Path):
        return hashlib.sha256(image_bytes(image)).hexdigest()[:16]
    pillow()
    plain = _plain(image)
    return hashlib.sha256(repr(plain.size).encode() + plain.tobytes()).hexdigest()[:16]


def image_bytes(image: Any) -> bytes:
    """The bytes of the image's file; an image of Pillow is written as PNG. Raises ``InputError`` like ``opened``."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return _existing(Path(image).expanduser(), "").read_bytes()
    pillow()
    buffer = BytesIO()
    _plain(image).save(buffer, "PNG")
    return buffer.getvalue()


def keep_image(image: Any, folder: Path) -> str:
    """Copy an image into ``folder/images``, under its digest and its own suffix; its path relative to ``folder``."""
    content = image_bytes(image)
    suffix = Path(image).suffix.lower() if isinstance(image, str | Path) else ".png"
    path = Path(IMAGES_FOLDER) / f"{hashlib.sha256(content).hexdigest()[:16]}{suffix}"
    if not (folder / path).exists():
        write_bytes(folder / path, content)
    return str(path)


def images_in(folder: Path) -> list[Path]:
    """The images in a folder and its subfolders, in order. Raises ``InputError`` if there are none."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise InputError(f"{folder} holds no images; expected files that end in {', '.join(SUFFIXES)}")
    return paths


def _existing(path: Path, prefix: str) -> Path:
    if path.is_file():
        return path
    near = did_you_mean(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""
    raise InputError(f"{prefix}the image {path} does not exist{near}; paths are relative to the file that names them")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().split("\n")[0]
