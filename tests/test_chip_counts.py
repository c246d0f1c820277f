"""Counting by chip is fast, and still what a plain argmax and softmax would count."""

import torch

from floodrepro.evaluation.chip_counts import count


def test_equal_logits_count_as_the_first_class_as_argmax_has_it():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-1, 2, (4, 3, 16, 16), generator=generator).half()  # ties in most pixels
    truth = torch.randint(-1, 3, (4, 16, 16), generator=generator)
    counts = count(logits, truth, -1)["counts"]
    predicted = logits.argmax(dim=1)
    for chip in range(4):
        for true_class in range(3):
            for k in range(3):
                pixels = (truth[chip] == true_class) & (predicted[chip] == k)
                assert counts[chip, true_class, k] == pixels.sum()


def test_ignored_pixels_leave_no_trace_whatever_their_logits_are():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 2, 8, 8, generator=generator)
    truth = torch.randint(0, 2, (3, 8, 8), generator=generator)
    truth[:, :4] = truth[2] = 255
    known = count(logits, truth, 255)
    logits[:, :, :4] += 100 * torch.randn(3, 2, 4, 8, generator=generator)
    again = count(logits, truth, 255)
    assert all(torch.equal(known[name], again[name]) for name in known)
    assert known["ignored"].tolist() == [32, 32, 64]
    assert known["counts"].sum(dim=(1, 2)).tolist() == [32, 32, 0]
