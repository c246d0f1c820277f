"""One flood as radar, optical, elevation and truth: pure functions of a random generator and a size.

A scene is a river valley of 10 m pixels that floods once. The four timesteps are a month before, before, event and
after, and only the event is flooded. What is drawn is meant to be learnable and to resist a threshold: speckle, fields
that are harvested or dry out while nothing floods, forest whose backscatter hardly falls when water stands under it,
wind on open water, clouds that are thickest when the flood is there, and swath edges.

Constants without a source of their own are typical values, chosen so that the flood class reads as ImpactMesh-Flood's
does (VV/VH about -10/-15 dB before the event, -15/-21 dB at it, and back), and checked by looking at the pictures.
Shape suffixes: T = 4 timesteps, C = bands, H, W = pixels.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage

from floodrepro.data.names import AFTER, BEFORE, EVENT, NO_DATA, S2_BANDS, TIMESTEPS

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Classes = npt.NDArray[np.uint8]
Shape = tuple[int, int]

WATER, BARE, CROP, GRASS, FOREST, URBAN = range(6)

# Mean VV and VH in dB, by land cover.
BACKSCATTER_DB = np.array([(-19.6, -25.2), (-10.0, -16.0), (-9.5, -14.8), (-10.5, -16.0), (-8.5, -13.5), (-5.0, -11.0)])
# ENL of Sentinel-1 IW GRDH products: ESA, Sentinel-1 Product Definition, S1-RS-MDA-52-7440, table 5-1.
LOOKS = 4.4

# Surface reflectance x 10,000 in the order of names.S2_BANDS, by land cover; then turbid flood water and cloud.
REFLECTANCE = 1.0 * np.array(
    [
        (380, 420, 480, 330, 290, 230, 210, 200, 180, 170, 110, 80),
        (850, 980, 1300, 1650, 1850, 2000, 2120, 2250, 2400, 2450, 2950, 2450),
        (330, 400, 720, 440, 1020, 2650, 3300, 3500, 3700, 3750, 1850, 920),
        (560, 680, 1000, 1020, 1500, 2350, 2700, 2850, 3000, 3050, 2600, 1600),
        (230, 280, 460, 290, 650, 1800, 2250, 2400, 2600, 2650, 1250, 560),
        (1150, 1300, 1480, 1620, 1780, 1950, 2080, 2180, 2280, 2330, 2400, 2150),
    ]
)
TURBID = 1.0 * np.array((640, 780, 1050, 1120, 1150, 860, 820, 760, 620, 480, 230, 160))
CLOUD = 1.0 * np.array((6300, 6200, 6000, 5900, 6100, 6200, 6300, 6400, 6500, 6600, 4300, 3200))

# Sen2Cor's scene classification: Sentinel-2 Products Specification Document, S2-PDGS-TAS-DI-PSD, table of SCL values.
SCL_NO_DATA, SCL_SHADOW, SCL_VEGETATION, SCL_BARE, SCL_WATER, SCL_THIN_CLOUD, SCL_CLOUD = 0, 3, 4, 5, 6, 8, 9


@dataclass(frozen=True)
class Ground:
    """What does not change between timesteps, all (H, W).

    `height` is in metres above the river's normal level; `elevation` in metres above the sea, canopies and roofs
    included; `cover` is WATER to URBAN; `field` numbers the farm fields; `flood` is under water at the event only.
    """

    height: Floats
    elevation: npt.NDArray[np.int16]
    cover: Classes
    field: npt.NDArray[np.int64]
    permanent: Flags
    flood: Flags


@dataclass(frozen=True)
class Scene:
    """A flood event as the satellites and the mappers saw it.

    `elevation` (H, W) in metres; `s1` (T, 2, H, W), VV and VH in dB, NaN where missing; `s2` (T, 12, H, W), reflectance
    x 10,000, NO_DATA where missing; `scl` (T, H, W), scene classification; (H, W) each: permanent water, flood water
    at the event, and `mapped`: inside the mapped area and seen by the radar at the event.
    """

    elevation: npt.NDArray[np.int16]
    s1: npt.NDArray[np.float16]
    s2: npt.NDArray[np.int16]
    scl: Classes
    permanent: Flags
    flood: Flags
    mapped: Flags


def make_scene(rng: np.random.Generator, shape: Shape, *, s1_edge: bool, s2_edge: bool) -> Scene:
    """A whole event's scene.

    Args:
        rng: The event's own generator; the same state gives the same scene.
        shape: Height and width in pixels.
        s1_edge: Whether the radar swath ends inside the scene, before the event and at it.
        s2_edge: Whether the optical swath ends inside the scene, a month before the event and after it.
    """
    ground = make_ground(rng, shape)
    s1 = radar(rng, ground)
    s2, scl = optical(rng, ground)
    s1[BEFORE, :, beyond_edge(rng, shape, 0.04) & s1_edge] = np.nan
    unseen = beyond_edge(rng, shape, 0.07) & s1_edge
    s1[EVENT, :, unseen] = np.nan
    missing = beyond_edge(rng, shape, 0.12) & s2_edge
    for step in (0, AFTER):
        s2[step, :, missing], scl[step, missing] = NO_DATA, SCL_NO_DATA
    mapped = ~(unseen | beyond_edge(rng, shape, 0.05))
    return Scene(ground.elevation, s1, s2, scl, ground.permanent, ground.flood, mapped)


def fractal(rng: np.random.Generator, shape: Shape, *, beta: float, scale: float) -> Floats:
    """A random surface (H, W) with zero mean and unit standard deviation; `beta` is 2 for rough, 4 for smooth.

    Spectral synthesis: white noise is given the power spectrum 1/f^beta (Saupe, Algorithms for random fractals, in
    Peitgen and Saupe, The Science of Fractal Images, Springer 1988, chapter 2). Beyond a wavelength of `scale` pixels
    the spectrum is flat, so that features keep their size in pixels whatever the size of the scene.
    """
    rows, cols = fft.fftfreq(shape[0])[:, None], fft.rfftfreq(shape[1])[None, :]
    amplitude = (rows**2 + cols**2 + scale**-2.0) ** (-beta / 4)
    amplitude[0, 0] = 0.0
    surface: Floats = fft.irfft2(fft.rfft2(rng.standard_normal(shape)) * amplitude, shape)
    return np.asarray(surface / surface.std())


def make_ground(rng: np.random.Generator, shape: Shape) -> Ground:
    """Terrain with a river valley, its water at the normal level and at the event, and its land cover."""
    height = _valley(rng, shape)
    # The normal level covers 3 to 6 % of the scene, and the flood another 10 to 24 %, so that every event holds both.
    height -= np.quantile(height, rng.uniform(0.03, 0.06))
    permanent = _without_specks(height < 0, 12)
    flood = flooded_area(height, permanent, rng.uniform(0.10, 0.24))
    cover, field = _land_cover(rng, height, permanent)
    tilt = np.linspace(0, 0.3e-3 * 10 * shape[0], shape[0])[:, None]
    canopy = 6.0 * (cover == FOREST) + 3.0 * (cover == URBAN)
    noise = 0.6 * rng.standard_normal(shape)
    elevation = rng.uniform(10, 250) + tilt + np.where(permanent, 0.0, height + canopy + noise)
    return Ground(height, np.rint(elevation).astype(np.int16), cover, field, permanent, flood)


def flooded_area(height: Floats, permanent: Flags, share: float) -> Flags:
    """Pixels (H, W) below a flood level that are connected to permanent water, without the permanent water itself.

    The level is found by bisection, so that the flood covers `share` of the scene, 0 to 1.
    """
    low, high = 0.0, float(height.max())
    flood = np.zeros_like(permanent)
    for _ in range(14):
        level = (low + high) / 2
        bodies, _count = ndimage.label((height < level) | permanent)
        reached = np.unique(bodies[permanent])
        flood = np.isin(bodies, reached[reached > 0]) & ~permanent
        low, high = (level, high) if flood.mean() < share else (low, level)
    return flood


def radar(rng: np.random.Generator, ground: Ground) -> npt.NDArray[np.float16]:
    """VV and VH in dB, float16 (T, 2, H, W), without missing pixels."""
    shape = ground.height.shape
    fields = int(ground.field.max()) + 1
    farmed = np.isin(ground.cover, (BARE, CROP, GRASS))
    # Fields that lose 3 to 7 dB although no water comes: harvested, ploughed or dried out, at one of three times.
    loss = np.where(rng.random(fields) < 0.14, rng.uniform(3.0, 7.0, fields), 0.0)
    since = rng.choice((BEFORE, EVENT, EVENT, AFTER), fields)
    regrown = rng.random(fields) < 0.5
    emergent = rng.uniform(0.6, 1.0, fields)  # 1 = short, wholly under water; less = stalks still stand out of it
    own = rng.normal(0, 0.9, fields)
    open_water = BACKSCATTER_DB[WATER] + (0.8, 0.3)
    images = []
    for step in range(len(TIMESTEPS)):
        db = BACKSCATTER_DB[ground.cover].transpose(2, 0, 1).copy()
        lost = loss * (step >= since) * np.where((step == AFTER) & regrown, 0.3, 1.0)
        change = own + rng.normal(0, 0.5, fields) - lost
        moisture = rng.normal(0, 0.4) + 0.5 * fractal(rng, shape, beta=3.0, scale=60)
        db += (change[ground.field] * farmed + moisture) * (ground.cover != WATER)
        db += 0.4 * fractal(rng, shape, beta=2.0, scale=20)
        if step == EVENT:
            db += emergent[ground.field] * (farmed & ground.flood) * (open_water[:, None, None] - db)
            # Double bounce between water and stems or walls: VV holds or rises where VH does not.
            db += np.array((1.2, -0.6))[:, None, None] * (ground.flood & ~farmed)
        wet = ground.permanent | (ground.flood & farmed & (step == EVENT))
        wind = np.clip(fractal(rng, shape, beta=3.5, scale=50) - 1.0, 0, 1.0)
        db += np.array((5.0, 2.5))[:, None, None] * (wind * wet)
        power = ndimage.gaussian_filter(10 ** (db / 10), (0, 0.6, 0.6))  # the sensor's 20 m resolution on 10 m pixels
        images.append(10 * np.log10(speckled(rng, power)))
    return np.stack(images).astype(np.float16)


def speckled(rng: np.random.Generator, power: Floats) -> Floats:
    """Linear backscatter times multi-look speckle: a gamma law of mean 1 and variance 1/LOOKS.

    Source: Oliver and Quegan, Understanding Synthetic Aperture Radar Images, SciTech 2004, chapter 4.
    """
    return power * rng.gamma(LOOKS, 1 / LOOKS, power.shape)


def optical(rng: np.random.Generator, ground: Ground) -> tuple[npt.NDArray[np.int16], Classes]:
    """Reflectance int16 (T, 12, H, W) and scene classification uint8 (T, H, W), without missing pixels."""
    shape = ground.height.shape
    fields = int(ground.field.max()) + 1
    farmed = np.isin(ground.cover, (BARE, CROP, GRASS))
    ripeness = rng.uniform(-0.3, 0.5, fields)
    brightness = rng.normal(1.0, 0.08, fields)
    texture = 1 + 0.05 * fractal(rng, shape, beta=2.0, scale=25)
    down, right = np.gradient(ndimage.gaussian_filter(ground.height, 1.5))
    shading = np.clip(1 + 0.06 * (right - down), 0.7, 1.3)  # the sun stands low in the upper left
    # What the flood shows of itself, colour and opacity: water, then mud.
    water, mud = np.where(farmed, 0.9, 0.3) * ground.flood, 0.4 * (farmed & ground.flood)
    traces = {EVENT: (TURBID, water), AFTER: (0.75 * REFLECTANCE[BARE], mud)}
    bands = np.empty((len(TIMESTEPS), len(S2_BANDS), *shape), np.int16)
    classes = []
    for step in range(len(TIMESTEPS)):
        dried = np.clip(ripeness + 0.12 * step, 0, 0.8)[ground.field] * (ground.cover == CROP)
        tone = np.where(farmed, brightness[ground.field], 1.0)
        colour, covered = traces.get(step, (TURBID, np.zeros(shape)))
        cloud, shadow = _clouds(rng, shape, rng.uniform(0.25, 0.75) if step == EVENT else rng.uniform(0, 0.25))
        light = texture * shading * rng.uniform(0.92, 1.08) * (1 - 0.55 * shadow)
        for band in range(len(S2_BANDS)):  # one at a time, for the memory of large scenes
            surface = REFLECTANCE[ground.cover, band]
            surface += dried * (REFLECTANCE[BARE, band] - surface)
            surface *= tone
            surface += covered * (colour[band] - surface)
            surface *= light
            surface += cloud * (CLOUD[band] * (0.9 + 0.1 * texture) - surface)
            surface += rng.standard_normal(shape) * (15 + 0.02 * surface)
            bands[step, band] = np.rint(np.clip(surface, 1, 16000))
        wet = ground.permanent | (ground.flood & farmed & (step == EVENT))
        classes.append(_classified(ground.cover, wet, cloud, shadow))
    return bands, np.stack(classes)


def beyond_edge(rng: np.random.Generator, shape: Shape, share: float) -> Flags:
    """The part of the scene (H, W) on the far side of a slanting straight line: beyond a swath or a mapped area."""
    angle = rng.uniform(0, 2 * np.pi)
    rows, cols = np.ogrid[: shape[0], : shape[1]]
    along = rows * np.sin(angle) + cols * np.cos(angle)
    return np.asarray(along > np.quantile(along, 1 - share))


def _valley(rng: np.random.Generator, shape: Shape) -> Floats:
    """Height (H, W) in metres above an arbitrary level: a winding river in its plain, hills beyond, perhaps a lake."""
    short = min(shape)
    along, across = np.meshgrid(np.arange(shape[1]), np.arange(shape[0]))
    if rng.random() < 0.5:
        along, across = across, along
    # The scene's width across the river, and waves that wind at most a fifth of it.
    width = int(across.max()) + 1
    middle = width * rng.uniform(0.3, 0.7) + along * rng.uniform(-0.2, 0.2)
    for wavelength, bend in ((1.3, 0.10), (0.5, 0.05), (0.22, 0.02)):
        middle = middle + width * bend * np.sin(2 * np.pi * (along / (wavelength * short) + rng.random()))
    distance = np.abs(across - middle)
    channel, plain = max(1.3, 0.015 * short), 0.16 * short
    hills = np.clip((distance - plain) / (1.5 * plain), 0, 1) ** 2
    height = -4.0 * np.exp(-((distance / channel) ** 2)) + 1.3 * np.minimum(distance / plain, 3)
    height += rng.uniform(8, 30) * hills
    if rng.random() < 0.6:
        rows, cols = np.ogrid[: shape[0], : shape[1]]
        lake_row, lake_col = rng.uniform(0.2, 0.8, 2) * shape
        from_lake = np.hypot(rows - lake_row, cols - lake_col)
        height -= 5.0 * np.exp(-((from_lake / (rng.uniform(0.03, 0.07) * short)) ** 4))
    return np.asarray(height + (0.7 + 3.0 * hills) * fractal(rng, shape, beta=3.2, scale=40))


def _land_cover(rng: np.random.Generator, height: Floats, permanent: Flags) -> tuple[Classes, npt.NDArray[np.int64]]:
    """Land cover and the index of each pixel's field, (H, W) each."""
    shape = height.shape
    seeds = rng.random(shape) < 1 / 17**2  # fields of about 17 x 17 pixels, 3 ha
    seeds[rng.integers(shape[0]), rng.integers(shape[1])] = True
    stretch = (1.0, 1.8) if rng.random() < 0.5 else (1.8, 1.0)
    row, col = ndimage.distance_transform_edt(~seeds, stretch, return_distances=False, return_indices=True)
    field = (np.cumsum(seeds).reshape(shape) - 1)[row, col]  # the index of the nearest seed
    cover = rng.choice((BARE, CROP, GRASS), int(seeds.sum()), p=(0.2, 0.5, 0.3))[field].astype(np.uint8)
    wooded = fractal(rng, shape, beta=3.6, scale=45) + 0.6 * np.clip(height / 5, 0, 2)
    cover[wooded > np.quantile(wooded, 0.83)] = FOREST
    built = fractal(rng, shape, beta=3.0, scale=30) + 0.4 * np.clip(height / 3, 0, 2)
    cover[built > np.quantile(built, 0.95)] = URBAN
    cover[permanent] = WATER
    return cover, field


def _clouds(rng: np.random.Generator, shape: Shape, share: float) -> tuple[Floats, Floats]:
    """Opacity of clouds and depth of their shadows, 0 to 1, (H, W) each; `share` of the scene is under cloud."""
    thickness = fractal(rng, shape, beta=3.6, scale=70)
    opacity: Floats = np.clip(2.5 * (thickness - np.quantile(thickness, 1 - share)), 0, 1)
    shadow: Floats = np.roll(opacity, rng.integers(6, 14, 2), (0, 1)) * (1 - opacity)
    return opacity, shadow


def _classified(cover: Classes, wet: Flags, cloud: Floats, shadow: Floats) -> Classes:
    """Scene classification uint8 (H, W) of one timestep, as an errorless classifier would give it."""
    scl = np.where(np.isin(cover, (BARE, URBAN)), SCL_BARE, SCL_VEGETATION).astype(np.uint8)
    scl[wet] = SCL_WATER
    scl[shadow > 0.3] = SCL_SHADOW
    scl[cloud > 0.15] = SCL_THIN_CLOUD
    scl[cloud > 0.6] = SCL_CLOUD
    return scl


def _without_specks(flags: Flags, pixels: int) -> Flags:
    """The connected parts of (H, W) that have at least `pixels` pixels, or the largest part if none has."""
    parts, count = ndimage.label(flags)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    sizes[0] = 0
    return np.asarray((sizes >= min(pixels, sizes.max()))[parts] & flags)
