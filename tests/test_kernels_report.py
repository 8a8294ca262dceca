"""Rows, targets and verdicts of the kernels chapter, from measurements made up by hand; and the live roofline and batches."""

import pytest
import torch

from sparsity_lib import results
from sparsity_lib.bench import batch, roofline
from sparsity_lib.experiments import kernels_report as chapter
from sparsity_lib.figures import kernels as figures


def times(median):
    return {"median_us": median, "low_us": 0.9 * median, "high_us": 1.1 * median, "best_us": 0.8 * median}


def product(speeds, shares=(0.9, 0.9, 0.9, 0.9)):
    points = [{"sparsity": s, "speedup": v, "share_of_bandwidth": b}
              for s, v, b in zip(chapter.MATVEC_SHOWN, speeds, shares, strict=True)]
    return {"best_dense": "torch _best", "points": points, "bandwidth": 1.0,
            "times": {"torch _best": times(100.0), "other": times(50.0),  # the other's is none of torch's
                      **{f"sparse {p['sparsity']}": times(100 / p["speedup"]) for p in points}}}


def decoding(ratio, dense_bytes=2.0, sparse_bytes=1.0, other=0.5):
    point = {"dense": 1.0, "sparse": 1 / ratio, "bandwidth": 4.0, "ratio": ratio,
             "bytes": {"dense": dense_bytes, "sparse": sparse_bytes}}
    speeds = {"ours, inputs 35%": ratio, "llama.cpp": other}
    engines = {name: {"over_ours_dense": found, "seconds": 1.0} for name, found in speeds.items()}
    later = {**point, "ratio": ratio - 0.2}
    return {"dense": {"prompts": {"256": point}}, "inputs 35%": {"prompts": {"256": point, "512": later}},
            "baselines": {"prompts": {"256": engines, "512": engines}}}


MATVEC = {"bfloat16 8 x 4": product((1.1, 2.0, 2.9, 7.0)), "bfloat16 4 x 8": product((1.0, 1.8, 2.9, 7.0), (0.9, 0.8, 0.9, 0.1)),
          "int8 8 x 4": product((1.0, 1.7, 2.0, 3.0))}
GLU = {"real": {"speedup": 1.5, "bytes_allow": 1.5, "best_dense": "torch _best", "times": {"torch _best": times(150.0),
                                                                                        "sparse": times(100.0)}},
       "big, scattered masks": {"speedup": 1.3, "bytes_allow": 1.5, "best_dense": "torch _best",
                                "times": {"torch _best": times(130.0), "sparse": times(100.0)}}}
EVALUATION = {"total": {"ratio": 2.7, "hflm": 27.0, "prefix": 10.0}, "sets": {}}


def test_a_target_is_judged_by_its_worst_case():
    data = {**MATVEC, "float32 8 x 4": product((1, 2, 3, 6)), "int4 8 x 4": product((1, 1.6, 2, 3))}
    found = {t.what: t for t in chapter.targets(data, GLU, {"tiny": decoding(1.9)}, EVALUATION)}
    half = found["bfloat16 product, 50% skipped: times torch's best dense"]
    assert (half.found, half.row()[-1]) == (1.8, "**missed**")
    assert found["bfloat16 product, 66% skipped: times torch's best dense"].row()[-1] == "reached"
    share = found["bfloat16 product, up to 80% skipped: share of the bandwidth"]
    assert (share.found, share.row()[-1]) == (0.8, "**missed**")  # what lies beyond 80% does not count
    assert found["int8 product, 50% skipped: times the best dense"].row()[-1] == "reached"
    assert found["int4 product, 50% skipped: times the best dense"].row()[-1] == "**missed**"
    assert found["FFN block, half of the neurons, larger shapes: times the best dense"].found == 1.3
    assert found["decoding tiny, 35% of the inputs: share of what the bytes predict"].found == pytest.approx(1.7 / 2)
    assert found["decoding tiny, 35% of the inputs: times llama.cpp, dense"].found == pytest.approx(3.8)


def test_rows_say_what_was_measured():
    (first, *_) = chapter.matvec_rows(MATVEC)
    assert first[:3] == ["bfloat16", "8 × 4", "best"]
    assert [str(n) for n in first[3:]] == ["1.10", "2.00", "2.90", "7.00", "90", "90"]
    (row,) = chapter.decode_rows({"tiny": decoding(1.9)})
    assert [str(cell) for cell in row] == ["tiny", "inputs 35%", "50", "2.00", "1.90", "1.70", "85"]
    (row,) = chapter.against_rows({"tiny": decoding(1.9)}, "llama.cpp")
    assert [str(cell) for cell in row[2:]] == ["3.80", "3.80"]
    assert chapter.against_rows({"tiny": decoding(1.9)}, "torch.compile") == []


def test_predictions_are_bytes_over_bandwidth():
    blocks, head = chapter.weights_of("Mistral-7B")
    assert blocks + head == pytest.approx(7.11e9, rel=0.01)
    row = next(r for r in chapter.prediction_rows((1.0, 0.5), 0.35) if r[0] == "Mistral-7B" and r[1].startswith("H100"))
    assert row[2].value == pytest.approx(3350e9 / (2 * (blocks + head)))
    assert row[3].value == pytest.approx(0.5 * 3350e9 / (2 * (0.35 * blocks + head)))
    cats, scap, cwic, _ = chapter.reported_rows((1.0, 0.5))
    assert cats[3].value < scap[3].value < 1 / (1 - 0.485) and cwic[3].value == pytest.approx(1 / 0.34) and cwic[5] is None
    assert scap[5].value == pytest.approx(scap[3].value / 2)
    assert chapter.efficiencies({"tiny": decoding(1.9)}, "tiny") == pytest.approx((0.5, 1.9 / 4))


def test_what_the_text_says_of_growth_and_wandering():
    runs = {"a": {"1": {"tokens": 10, "seconds": 1.0}, "2": {"tokens": 40, "seconds": 3.0}},
            "b": {"2": {"tokens": 40, "seconds": 8.0}, "1": {"tokens": 10, "seconds": 2.0}}}
    assert chapter.growth({"text": {"tiny": runs}}, "tiny") == (4.0, (3.0, 4.0))
    tiny = decoding(1.9)
    for point in tiny["baselines"]["prompts"].values():
        point["bandwidth"] = 9.0
    assert chapter.bandwidths(MATVEC, {}, {"tiny": tiny}) == (1.0, 9.0)
    assert chapter.gains({"tiny": tiny}, "tiny") == pytest.approx((1.9, 1.7))


def test_verdicts_take_their_range_from_the_quartiles():
    found = chapter.verdict_block(GLU, "real")
    assert (found.low, found.high) == (pytest.approx(135 / 110), pytest.approx(165 / 90)) and found.outcome == "reproduced"
    assert chapter.verdict_product(MATVEC, "int8 8 x 4").outcome == "direction only"
    assert chapter.verdict_decode({"tiny": decoding(1.9)}, "tiny").outcome == "direction only"


def test_more_tokens_move_to_the_right_of_the_roofline(monkeypatch):
    monkeypatch.setattr(roofline, "WIDTH", 64)
    monkeypatch.setattr(roofline, "TOKENS", (1, 4, 32))
    found = roofline.measure(torch.float32, rounds=1)
    intensities = [x for x, _ in found.points]
    assert intensities == sorted(intensities) and intensities[0] == pytest.approx(0.5, rel=0.05)
    assert found.ridge == found.peak / found.bandwidth
    figures.roofline(found)


@pytest.mark.parametrize("order", batch.ORDERS)
def test_batches_hold_every_position_but_the_first_once(order):
    layer = torch.arange(4 * 5)[..., None].reshape(4, 5, 1).float()
    for size in (1, 2, 4):
        found = batch.batches(layer, order, size)
        assert found.shape[1:] == (size, 1)
        assert sorted(found.flatten().tolist()) == sorted(layer[:, 1:].flatten().tolist())
    pair = batch.batches(layer, order, 2)[0].flatten().tolist()
    assert pair == ([1.0, 2.0] if order == "neighbours" else [1.0, 6.0])


def test_what_any_token_reads_is_counted():
    layer = torch.tensor([[[9.0, 9], [3, 1], [1, 3]]])  # the first position is left out
    found = batch.read_by_batch([layer], "neighbours", (1, 2), 0.5)
    assert found == {"1": 0.5, "2": 1.0}


def test_the_kept_measurements_fill_every_table_and_figure():
    names = ("matvec", "glu", "batch", "decode", "evaluation", "calibration")
    data = {name: results.load(f"bench/{name}").data for name in names}
    figures.latency(data["matvec"]), figures.decoding(data["decode"]), figures.batches(data["batch"])
    figures.blocks(chapter.block_rows(data["glu"]))
    rows = [chapter.matvec_rows(data["matvec"]), chapter.decode_rows(data["decode"]), chapter.evaluation_rows(data["evaluation"]),
            chapter.calibration_rows(data["calibration"]), chapter.against_rows(data["decode"], "llama.cpp"),
            chapter.targets(data["matvec"], data["glu"], data["decode"], data["evaluation"])]
    assert all(rows)
