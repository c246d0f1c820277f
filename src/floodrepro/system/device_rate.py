"""What a device can do at most, measured, and what a recipe's model asks of it, counted."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from floodrepro.recipe import Recipe
from floodrepro.system.bench_sides import parse, surroundings
from floodrepro.training.recorder import percentiles

FORWARDS_OF_A_STEP = 3
"""A training step costs three forwards: each product has two more in the backward pass, for input and weight."""

_ROUNDS = 10
_WARM_UP_SECONDS = {"cuda": 2.0, "cpu": 0.1}  # first products choose a kernel; a GPU takes a while to raise its clock
_PRODUCTS = {"cuda": 50, "cpu": 1}  # between two waits for the device: some 100 ms each
_DTYPES = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32}  # by how a precision's name begins


def device_facts(recipe: Recipe, size: int) -> dict[str, Any]:
    """What figures of training are held against; for a process of its own.

    Args:
        recipe: Whose model is counted.
        size: A chip's edge in pixels.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = _DTYPES[str(recipe["trainer"]["precision"]).partition("-")[0]]
    dtype, edge = (named, 8192) if device.type == "cuda" else (torch.float32, 1024)
    facts = {"matmul_tflops": matmul_tflops(device, dtype, edge), "forward_gflop_per_chip": forward_gflop(recipe, size)}
    return surroundings(recipe) | facts


def matmul_tflops(device: torch.device, dtype: torch.dtype, edge: int) -> dict[str, Any]:
    """TFLOP/s of products of two square matrices, 2 edge^3 operations each: median, p10 and p90."""
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    product, rates = torch.empty_like(a), list[float]()
    count, begin = _PRODUCTS[device.type], time.perf_counter()
    while len(rates) < _ROUNDS:
        start = time.perf_counter()
        for _ in range(count):
            torch.mm(a, b, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if start - begin >= _WARM_UP_SECONDS[device.type]:
            rates.append(count * 2 * edge**3 / (time.perf_counter() - start) / 1e12)
    return {"dtype": str(dtype).removeprefix("torch."), "edge": edge, **(percentiles(rates) or {})}


def forward_gflop(recipe: Recipe, size: int) -> float:
    """GFLOP of one chip's forward pass, counted on torch's meta device, where nothing is computed.

    Two for each multiplication with an addition in matmuls, convolutions and attention, as torch's counter has them.

    Args:
        recipe: With a model that takes images (B, C, T, H, W) by modality.
        size: Height and width in pixels.
    """
    with tempfile.TemporaryDirectory(prefix="floodrepro-bench-") as folder:
        overrides = ("--trainer.precision=32-true", "--model.init_args.model_args.backbone_pretrained=false")
        cli = parse(recipe, Path(folder), Path(folder), overrides)
        cli.build()
    data = recipe["data"]["init_args"]
    steps = len(data["timesteps"])
    images = {
        modality: torch.empty(1, len(data["means"][modality]), steps, size, size, device="meta")
        for modality in data["modalities"]
    }
    model = cli.model.model.to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return round(int(counter.get_total_flops()) / 1e9, 1)
