"""Metrics for less work: the same values, without the one that means nothing."""

import torch

from floodrepro import recipe as recipes
from floodrepro.training.recipe_cli import RecipeCLI
from floodrepro.training.wiring import without_files


def task(*, trim: bool):
    cli = RecipeCLI([recipes.find("demo")])
    cli.build(lambda config: without_files(config, progress_bar=False), trim=trim)
    return cli.model


def test_trimmed_metrics_have_the_same_values_and_no_boundary_iou():
    stock, trimmed = task(trim=False).val_metrics, task(trim=True).val_metrics
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        predicted = torch.randint(0, 2, (2, 32, 32), generator=generator)
        labels = torch.randint(-1, 2, (2, 32, 32), generator=generator)
        stock.update(predicted, labels)
        trimmed.update(predicted, labels)
    theirs, ours = stock.compute(), trimmed.compute()
    assert theirs.keys() - ours.keys() == {"val/Boundary_mIoU"}
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_values_are_still_checked_where_labels_are_not_known():
    model = task(trim=True)
    assert not model.val_metrics["mIoU"].validate_args
    cli = RecipeCLI([recipes.find("demo")])
    cli.build(lambda config: without_files(config, progress_bar=False), trim=False)
    from floodrepro.training.cheaper import trim_metrics

    trim_metrics(cli.model, labels_known=False)
    assert cli.model.val_metrics["mIoU"].validate_args
