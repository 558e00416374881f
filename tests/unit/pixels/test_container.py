"""Media that would make libav open other files or the network, or allocate too much memory, are refused."""

from __future__ import annotations

import io
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from svd_ds.curate.probe import probe_image, probe_video
from svd_ds.data.decoding import decode, select_video_stream
from svd_ds.pixels.container import open_container
from svd_ds.pixels.still import FORMATS, MAX_PIXELS, TooLargeError, read_still
from tests.unit.data.test_reader import png_bomb
from tests.videos import encode, moving_square

PLAYLISTS = {
    "concat": "ffconcat version 1.0\nfile secret.mp4\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>'
    '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>secret.mp4'
    "</BaseURL></Representation></AdaptationSet></Period></MPD>",
}


@pytest.fixture
def folder_with_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "secret.mp4").write_bytes(encode(moving_square(4)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("read", [lambda path: list(decode(path.read_bytes(), [0])), probe_video])
def test_file_that_names_others_opens_none_of_them(
    folder_with_a_secret: Path, kind: str, read: Callable[[Path], object]
) -> None:
    path = folder_with_a_secret / "clip.mp4"
    path.write_text(PLAYLISTS[kind])
    with pytest.raises(ValueError, match="cannot be decoded"):
        read(path)


def test_name_is_not_a_protocol_for_libav(folder_with_a_secret: Path) -> None:
    """In the folder `.` a path is a name alone, of which libav takes the part before a colon for a
    protocol."""
    (folder_with_a_secret / "concat:secret.mp4|secret.mp4").write_bytes(encode(moving_square(7, 16, 16)))
    with open_container(Path("concat:secret.mp4|secret.mp4")) as container:
        assert container.streams.video[0].width == 16


def still(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 9)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_image_with_too_many_pixels_is_not_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = still(kind)
    assert read_still(content, max_pixels=72).shape == (9, 8, 3)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(TooLargeError, match="the file claims 9 x 8 pixels, but at most 71"):
        read_still(content, max_pixels=71)


@pytest.mark.parametrize("side", [9_500, 16_000, 50_000])
def test_curation_refuses_pictures_above_the_limit(tmp_path: Path, side: int) -> None:
    """Pillow itself refuses images above twice the limit."""
    (tmp_path / "bomb.png").write_bytes(png_bomb(side, side))
    with pytest.raises(ValueError, match=rf"{side} x {side} pixels, .* {MAX_PIXELS}|exceeds limit"):
        probe_image(tmp_path / "bomb.png")


def motion_jpeg_bomb(side: int) -> bytes:
    """Make an AVI of 16 x 16 pixels by its header, whose JPEGs claim more."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuvj420p"
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    sizes = struct.pack(">HH", 16, 16)
    return buffer.getvalue().replace(
        b"\xff\xc0\x00\x11\x08" + sizes, b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", side, side)
    )


def test_curation_refuses_videos_above_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "bomb.avi"
    path.write_bytes(motion_jpeg_bomb(16))
    assert probe_video(path)["height"] == 16
    path.write_bytes(motion_jpeg_bomb(16_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"cannot be decoded|can be decoded"):
        probe_video(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000, "kB: nothing was allocated"
    path.write_bytes(encode(moving_square(4, 16, 16)))
    with open_container(path) as container:
        assert select_video_stream(container, 16 * 16).width == 16
        with pytest.raises(TooLargeError, match="claims 16 x 16 pixels, but at most 255"):
            select_video_stream(container, 16 * 16 - 1)


def test_decoders_refuse_frames_above_the_limit() -> None:
    """The size in the header is not trusted."""
    content = encode(np.zeros((2, 1040, 1040, 3), np.uint8))
    for max_pixels, is_refused in ((1040 * 1040, False), (16 * 16, True)):
        with open_container(content, max_pixels, {"skip_frame": "all"}) as container:
            if is_refused:
                with pytest.raises(av.FFmpegError):
                    list(container.decode(video=0))
            else:
                assert len(list(container.decode(video=0))) == 2


def test_formats_that_start_a_program_are_refused() -> None:
    """Pillow passes EPS to Ghostscript."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(
        ValueError, match=r"cannot be read as an image \(its format is unknown: it must be one of JPEG, "
    ):
        read_still(eps)


def test_heic_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="it is HEIC; convert it to JPEG or PNG"):
        read_still(b"\0\0\0\x18ftypheic" + bytes(40))
