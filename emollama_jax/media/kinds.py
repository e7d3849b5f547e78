"""What a file is by its first bytes: a video, sound, a picture, or none of these."""

HEAD = 4096  # bytes that are looked at

_CONTAINERS = {  # by the four letters of a RIFF or an ISO file
    b"AVI ": "video",
    b"WAVE": "audio",
    b"WEBP": "image",
    b"M4A ": "audio",
    b"M4B ": "audio",
    b"avif": "image",
    b"heic": "",
    b"heix": "",
    b"mif1": "",
}
_STARTS = {
    b"\x1a\x45\xdf\xa3": "video",  # Matroska, WebM
    b"FLV\x01": "video",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "video",  # ASF
    b"OggS": "video",
    b"\x00\x00\x01\xba": "video",  # MPEG program stream
    b"\x00\x00\x01\xb3": "video",  # MPEG video
    b".RMF": "video",
    b"\x06\x0e\x2b\x34": "video",  # MXF
    b"nut/multimedia container\x00": "video",
    b"DKIF": "video",
    b"YUV4MPEG2": "video",
    b"ID3": "audio",
    b"fLaC": "audio",
    b"caff": "audio",
    b".snd": "audio",
    b"#!AMR": "audio",
    b"MAC ": "audio",
    b"\x0b\x77": "audio",  # AC-3
    b"\x89PNG\r\n\x1a\n": "image",
    b"\xff\xd8\xff": "image",
    b"GIF87a": "image",
    b"GIF89a": "image",
    b"BM": "image",
    b"II*\x00": "image",
    b"MM\x00*": "image",
}
_ATOMS = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"moof", b"styp")  # that begin a film without a brand


def kind_of(head: bytes) -> str:
    """Return video, audio or image for the first HEAD bytes of a file; "" for what is none of them.

    A container that may hold either counts as a video.
    """
    if head[:4] in (b"RIFF", b"RF64"):
        return _CONTAINERS.get(head[8:12], "")
    if head[4:8] == b"ftyp":
        return _CONTAINERS.get(head[8:12], "video")
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "audio"
    if head[4:8] in _ATOMS:
        return "video"
    for start, kind in _STARTS.items():
        if head.startswith(start):
            return kind
    for packet, first in ((188, 0), (192, 4)):  # MPEG transport stream, that of cameras
        at = range(first, len(head), packet)
        if len(at) >= 3 and all(head[i] == 0x47 for i in at[:8]):
            return "video"
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:  # MP3, AAC
        return "audio"
    return ""
