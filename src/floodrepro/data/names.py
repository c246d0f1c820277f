"""ImpactMesh-Flood's vocabulary: modalities, file names, bands, timesteps, splits and mask classes.

The values were read from the published data set and from impactmesh 0.1.2. Nothing here imports numpy, so that every
command of the CLI can afford this module.
"""

import re
from dataclasses import dataclass

MODALITIES = ("S2L2A", "S1RTC", "DEM")
LABEL_DIR = "MASK"
SUFFIXES = {
    "S2L2A": "_S2L2A.zarr.zip",
    "S1RTC": "_S1RTC.zarr.zip",
    "DEM": "_DEM.tif",
    LABEL_DIR: "_annotation_flood.tif",
}
"""File name of a chip's part = chip id + suffix; keyed by modality, and by LABEL_DIR for the mask."""

S2_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
S1_BANDS = ("vv", "vh")
TIMESTEPS = ("month before", "before", "event", "after")
BEFORE, EVENT, AFTER = 1, 2, 3

NO_DATA = -9999
IGNORE_INDEX = -1
SPLITS = ("train", "val", "test")

# The area is kept as text: whether it is ever zero-padded is not known, and a chip id has to survive parse and str.
_CHIP_ID = re.compile(
    r"(?P<event>EMSR[0-9]+)_(?P<area>[0-9]+)_"
    r"(?P<tile>(?:0?[1-9]|[1-5][0-9]|60)[C-HJ-NP-X][A-HJ-NP-Z][A-HJ-NP-V])_"
    r"x(?P<easting>0|[1-9][0-9]*)_y(?P<northing>0|[1-9][0-9]*)"
)


@dataclass(frozen=True)
class Protocol:
    """What the values of a mask on disk mean.

    Args:
        name: `v0` or `v1`, the data set's version.
        class_names: One name a mask value, from 0 up; IGNORE_INDEX is not among them.
        chip_counts: Number of chips that the published version lists in train, val and test (the order of SPLITS).
    """

    name: str
    class_names: tuple[str, ...]
    chip_counts: tuple[int, int, int]


PROTOCOLS = {
    "v0": Protocol("v0", ("rest", "flood"), (57_067, 9_028, 14_556)),
    "v1": Protocol("v1", ("no water", "permanent water", "flood water"), (19_448, 2_171, 2_959)),
}

LABEL_MAPS = {"v0": [0, 1], "v1-binary": [0, 0, 1], "v1": [0, 1, 2]}
"""By protocol, the class of each mask value on disk."""


def protocol_of(label_map: object) -> str | None:
    """The protocol that a label map belongs to; None where it is none of the three."""
    return next((name for name, labels in LABEL_MAPS.items() if labels == label_map), None)


@dataclass(frozen=True)
class ChipId:
    """A chip's name: `EMSR<n>_<area>_<MGRS tile>_x<easting>_y<northing>`.

    Args:
        event: Copernicus EMS activation, such as `EMSR686`.
        area: Number of the mapped area within the activation, as text.
        tile: Sentinel-2 tile in the Military Grid Reference System, such as `35TMF`.
        easting: UTM easting in metres.
        northing: UTM northing in metres.
    """

    event: str
    area: str
    tile: str
    easting: int
    northing: int

    @classmethod
    def parse(cls, text: str) -> "ChipId":
        """The chip id that `text` spells out in full.

        Raises:
            ValueError: If `text` is anything else, an empty line or a file name included.
        """
        match = _CHIP_ID.fullmatch(text)
        if match is None:
            raise ValueError(f"not a chip id: {text!r} (expected EMSR<n>_<area>_<MGRS tile>_x<easting>_y<northing>)")
        event, area, tile, easting, northing = match.groups()
        return cls(event, area, tile, int(easting), int(northing))

    def __str__(self) -> str:
        """The name as split files and file names spell it."""
        return f"{self.event}_{self.area}_{self.tile}_x{self.easting}_y{self.northing}"


def split_file(split: str) -> str:
    """Name of the text file that lists a split's chip ids, one a line."""
    return f"impactmesh_flood_{split}.txt"


def mgrs_tile(zone: int, latitude: float, easting: int, northing: int) -> str:
    """Grid zone and 100 km square, such as `35TMF`, of a point between 80 degrees south and 84 degrees north.

    The exceptions for Norway and Svalbard are left out. Source: lettering scheme AA of NGA.STND.0037, The Universal
    Grids and the Transverse Mercator and Polar Stereographic Map Projections (2014).

    Args:
        zone: UTM zone, 1 to 60.
        latitude: Degrees, negative in the south.
        easting: UTM easting in metres.
        northing: UTM northing in metres, counted from 10,000,000 at the equator in the south.
    """
    band = "CDEFGHJKLMNPQRSTUVWX"[min(int((latitude + 80) // 8), 19)]
    column = ("ABCDEFGH", "JKLMNPQR", "STUVWXYZ")[(zone - 1) % 3][easting // 100_000 - 1]
    row = "ABCDEFGHJKLMNPQRSTUV"[(northing // 100_000 + (5 if zone % 2 == 0 else 0)) % 20]
    return f"{zone:02d}{band}{column}{row}"
