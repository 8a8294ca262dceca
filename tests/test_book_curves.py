"""Curves, speeds, the choice of a method and the explorer's data."""

import dataclasses
import json

import numpy as np
import pytest
from book_checkout import put, small_book

from sparsity_lib import results, style
from sparsity_lib.book import choose, curves, explorer, speeds
from sparsity_lib.evaluate.bootstrap import Interval

checkout = pytest.fixture(small_book)


def point(skipped, kl, site="up_in", dropped=0.5, width=0.01):
    return curves.Point(skipped, {site: dropped}, Interval(kl, kl - width, kl + width), np.exp(kl))


def curve(method, *points, sites="inputs"):
    return curves.Curve(method, sites, points, "made-up")


class TestCurves:
    def test_a_curve_is_read_between_its_points_and_not_beyond(self):
        c = curve("teal", point(0.1, 0.02), point(0.3, 0.5, dropped=0.9))
        assert c.at(0.09) is None and c.at(0.31) is None
        assert c.at(0.1).kl.value == pytest.approx(0.02) and c.at(0.3).perplexity == pytest.approx(np.exp(0.5))
        middle = c.at(0.2)  # half way: the geometric mean of what is on a logarithm, the mean of shares
        assert middle.kl.value == pytest.approx(0.1) and middle.sites["up_in"] == pytest.approx(0.7)
        assert middle.kl.low == pytest.approx((0.01 * 0.49) ** 0.5)

    @pytest.mark.parametrize(("sites", "expected"), [
        ({"gate": 0.5}, "neurons"), ({"up_in": 0.3, "down_in": 0.001}, "up"), ({"up_in": 0.0, "down_in": 0.3}, "down"),
        ({"up_in": 0.3, "down_in": 0.3}, "ffn"), ({"up_in": 0.3, "down_in": 0.3, "qkv_in": 0.2, "o_in": 0.1}, "inputs"),
        ({"up_in": 0.3, "head_in": 0.3}, "head"), ({"stripes": 0.5}, "stripes"),
    ])
    def test_sites_are_named_by_what_is_dropped(self, sites, expected):
        assert curves.where(sites) == expected and expected in curves.SITES

    def test_own_share_leaves_out_kinds_that_drop_nothing_anywhere(self):
        one, two = (curves.Point(s, {"up_in": up, "down_in": 0.4, "o_in": 0.001}, Interval(1, 1, 1), 2.0)
                    for s, up in ((0.1, 0.0), (0.2, 0.2)))
        assert curve("scap", one, two).kinds == ("up_in", "down_in") and curve("scap", one).kinds == ("down_in",)
        assert curve("scap", one, two).own(one) == pytest.approx(0.2) and curve("scap", one).own(one) == pytest.approx(0.4)

    def test_the_stored_curves_rise_in_share_and_have_a_look(self):
        for model, found in curves.curves().items():
            assert {"cats neurons", "teal inputs", "scap ffn", "scap up", "scap down"} <= set(found), model
            for c in found.values():
                shares = [p.skipped for p in c.points]
                assert len(shares) > 1 and shares == sorted(shares) and style.look(c.method)
                assert all(p.kl.low <= p.kl.value <= p.kl.high and 0 < c.own(p) < 1 for p in c.points)

    def test_what_rotations_read_is_taken_off(self):
        stored = results.load("claws_sweep")
        data = stored.data
        for model, own in curves._sweep(stored).items():
            found = {c.name: c for c in own}
            shares = data[model]["larosa"]["shares"].values()
            charged = sorted(s["skipped"] - s["transform_weights"] / s["dense_weights"] for s in shares)
            assert [p.skipped for p in found["larosa inputs"].points] == pytest.approx([c for c in charged if c > 0])
            assert all(s["transform_weights"] > 0.04 * s["dense_weights"] for s in shares)

    def test_scaps_front_is_not_beaten_by_any_of_its_settings(self):
        stored = results.load("scap_grid")
        data = stored.data
        for model, fronts in curves._scap(stored).items():
            found = {c.name: c for c in fronts}
            own = [p for p in data[model]["points"] if p["method"] == "scap"]
            for p in found["scap ffn"].points:
                for other in own:  # the slow way
                    kl = sum(other["quality"]["kl"]) / sum(other["quality"]["tokens"])
                    assert not (other["skipped"] >= p.skipped and kl < p.kl.value - 1e-9)

    def test_the_comparison_takes_over_once_it_is_there(self, checkout):
        quality = {"nll": [1.0, 2.0], "kl": [0.1, 0.3], "agree": [1.0, 1.0], "tokens": [1, 1]}

        def at(share, **more):
            return {"share": share, "quality": quality, "shares": {"skipped": share, "sites": {"gate": share}}, **more}

        trained = [{"share": share, "artifact": "x", "quality": quality, "shares": {"skipped": share}} for share in (0.5, 0.7)]
        methods = {"cwic": trained, "cats": [at(0.2), {"share": 0.9, "reason": "cannot"}, at(0.1)], "claws": [at(0.1)],
                   "nobody knows": [at(0.1)] * 2, "wanda": [{"share": 0.1, "quality": quality, "shares": {"skipped": 0.1}}] * 2}
        data = {model: {"methods": methods} for model in curves.MODELS}
        put("compare_quality", data)
        found = curves.curves.__wrapped__()
        assert {name: c.result for name, c in found["gemma3-270m"].items()} == {
            "cats neurons": "compare_quality", "cwic stripes": "compare_quality"}
        assert [p.skipped for p in found["gemma3-270m"]["cats neurons"].points] == [0.1, 0.2]
        assert [curves.Curve.own(c, p) for c in [found["gemma3-270m"]["cwic stripes"]] for p in c.points] == [0.5, 0.7]
        assert found["gemma3-270m"]["cats neurons"].points[0].kl.value == pytest.approx(0.2)

    def test_the_searchs_choice_has_a_curve_of_its_own(self, checkout):
        quality = {"nll": [1.0], "kl": [0.1], "agree": [1.0], "tokens": [1]}
        points = [{"share": share, "quality": quality,
                   "shares": {"skipped": share - 0.01, "rotations_free": share, "sites": {"up_in": share, "head_in": share}}}
                  for share in (0.6, 0.4)]
        data = {"models": {model: {"held out": {"chosen": {"points": [*points, {"share": 0.9, "reason": "cannot"}]}}}
                           for model in curves.MODELS}}
        put("compare_search", data)
        found = curves.curves.__wrapped__()["gemma3-270m"]["spread head"]
        assert [p.skipped for p in found.points] == pytest.approx([0.39, 0.59]) and found.result == "compare_search"

    def test_without_results_there_is_nothing(self, checkout):
        assert curves.curves.__wrapped__() == {} and speeds.settings.__wrapped__() == {} and speeds.compared.__wrapped__() == {}


class TestSpeeds:
    def test_time_lies_on_a_line_between_measured_settings(self, monkeypatch):
        monkeypatch.setattr(speeds, "settings", lambda: {"m": {"inputs": [(0.0, 1.0), (0.4, 2.0)]}})
        monkeypatch.setattr(speeds, "compared", lambda: {"m": {"larosa": [(0.0, 1.0), (0.2, 1.1)]}})
        assert speeds.speed("m", "teal", 0.2) == pytest.approx(1 / 0.75) and speeds.speed("m", "teal", 0.0) == 1
        assert speeds.speed("m", "teal", 0.5) is None and speeds.speed("m", "wina", 0.1) is None
        assert speeds.speed("m", "larosa", 0.1) == pytest.approx(1 / (0.5 + 0.5 / 1.1)) and speeds.speed("n", "teal", 0.1) is None

    def test_the_comparisons_rows_are_read(self, checkout):
        rows = [{"method": "teal", "skipped": 0.4, "ratio": 1.5}, {"method": "teal", "skipped": 0.2, "ratio": 1.2},
                {"method": "nm", "reason": "cannot"}]
        put("bench/compare", {"m": rows})
        assert speeds.compared.__wrapped__() == {"m": {"teal": [(0.0, 1.0), (0.2, 1.2), (0.4, 1.5)]}}

    def test_the_stored_settings_hold_for_methods_without_a_rotation(self, monkeypatch):
        own = speeds.points("smollm2-135m-instruct", "larosa")
        assert own == [] or own == speeds.compared()["smollm2-135m-instruct"]["larosa"]
        monkeypatch.setattr(speeds, "compared", dict)
        assert speeds.points("smollm2-135m-instruct", "teal")[0] == (0.0, 1.0) and len(speeds.points("gemma3-270m", "cats")) > 1
        assert speeds.points("smollm2-135m-instruct", "larosa") == []


class TestChoose:
    @pytest.fixture
    def made(self, monkeypatch):
        found = {"m": {c.name: c for c in (
            curve("teal", point(0.1, 0.10), point(0.5, 0.50)), curve("larosa", point(0.1, 0.11), point(0.3, 0.20, width=0.001)),
            curve("cats", point(0.1, 0.4), point(0.5, 0.9), sites="neurons"),
            curve("scap", point(0.1, 0.01), point(0.5, 0.02), sites="up"),
            curve("oracle", point(0.1, 0.001), point(0.5, 0.002), sites="neurons"))}}
        monkeypatch.setattr(choose, "curves", lambda: found)
        monkeypatch.setattr(choose, "speed", lambda model, method, skipped: 1.5 if method == "teal" else None)

    def test_methods_are_ranked_without_bounds_and_parts(self, made):
        assert [c.method for c, _ in choose.ranked("m", 0.1)] == ["teal", "larosa", "cats"]
        assert [c.method for c, _ in choose.level(choose.ranked("m", 0.1))] == ["teal", "larosa"]
        assert [c.method for c, _ in choose.ranked("m", 0.4)] == ["teal", "cats"] and choose.ranked("m", 0.6) == []
        assert choose.ranked("m", 0.504)[0][1].kl == choose.ranked("m", 0.5)[0][1].kl and choose.ranked("m", 0.506) == []

    def test_what_was_measured_apart_is_not_ranked_beside_what_was_measured_together(self, made):
        choose.curves()["m"] |= {name: dataclasses.replace(choose.curves()["m"][name], result="compare_quality")
                                 for name in ("larosa inputs", "cats neurons")}
        assert [c.method for c, _ in choose.ranked("m", 0.1)] == ["larosa", "cats"]

    def test_the_table_names_who_is_level_and_how_far_the_next_is(self, made):
        rows = [line for line in choose.ranking().splitlines() if line.startswith("| m ")]
        assert rows[0].startswith("| m | 10% | **TEAL and LaRoSA** | ")
        assert rows[0].endswith(">1.50</span> | CATS, 4.0 times the KL |")
        assert "**TEAL**" in rows[-1] and len(rows) == 7

    def test_the_advice_takes_as_few_methods_as_lead_all_the_way(self, made):
        level = {s: {c.method for c, _ in choose.level(choose.ranked("m", s / 100))} for s in range(10, 51)}
        last = max(s for s, methods in level.items() if "teal" in methods and s <= 30)
        assert {s for s, methods in level.items() if "larosa" in methods} == set(range(10, 31)) and 20 < last < 30
        assert choose.stretches("m") == [("TEAL", 0.1, last / 100), ("LaRoSA", 0.1, 0.3), ("TEAL", 0.31, 0.5)]
        assert choose.advice() == "- m: **LaRoSA** from 10% to 30%, then **TEAL** from 31% to 50% of all weights skipped.\n"

    @pytest.mark.parametrize(("spans", "expected"), [
        ([], []), ([("a", 0.1, 0.2)], [("a", 0.1, 0.2)]),
        ([("a", 0.1, 0.2), ("b", 0.1, 0.3), ("c", 0.15, 0.4)], [("b", 0.1, 0.3), ("c", 0.3, 0.4)]),
        ([("a", 0.1, 0.2), ("b", 0.4, 0.5)], [("a", 0.1, 0.2), ("b", 0.4, 0.5)]),
        ([("a", 0.1, 0.5), ("b", 0.2, 0.3)], [("a", 0.1, 0.5)]),
    ])
    def test_stretches_cover_what_was_measured(self, spans, expected):
        assert choose.led(spans) == expected

    def test_without_results_the_advice_says_so(self, monkeypatch):
        monkeypatch.setattr(choose, "curves", dict)
        assert choose.advice() == "Nothing has been measured yet: `make results`.\n"

    def test_what_tasks_say_stands_beside_the_ranking(self, monkeypatch):
        shown = choose.by_tasks()
        assert "Gemma at 40%: " in shown and "SmolLM2 at 40%: " in shown and shown.count("[") == 6
        assert "On 420 documents of each of seven tasks, at the same shares: SmolLM2: " in shown
        monkeypatch.setattr(choose.results, "names", lambda: ["compare_tasks"])
        assert choose.by_tasks() == shown[:shown.index(" On 420")] + "\n"
        monkeypatch.setattr(choose.results, "names", list)
        assert choose.by_tasks().endswith("`make results R=compare_tasks`.\n")

    def test_what_was_trained_is_not_ranked(self, made):
        choose.curves()["m"]["cwic stripes"] = curve("cwic", point(0.1, 0.001), point(0.5, 0.002), sites="stripes")
        assert [c.method for c, _ in choose.ranked("m", 0.1)] == ["teal", "larosa", "cats"]


class TestExplorer:
    def test_its_data_is_plain_small_and_cannot_end_the_script(self):
        text = explorer.page()
        assert text.count("</script>") == 1 and len(text) < 400_000 and text.startswith("```{raw} html\n")
        data = explorer.data()
        assert json.loads(json.dumps(data, allow_nan=False)) == data
        for model in data["models"].values():
            for c in model["curves"].values():
                assert c["sites"] in data["sites"] and all(len(p) == 7 for p in c["points"])
                assert model["masks"] is None or c["score"] is None or c["score"] in model["masks"]["ranks"]

    def test_lines_are_dashed_as_in_the_figures(self):
        assert explorer._dash(style.look("teal")) == "" and explorer._dash(style.look("teal_greedy")) == "12 6"

    def test_the_masks_share_is_that_of_the_site_it_shows(self):
        model = "smollm2-135m-instruct"
        found, stored = explorer.data()["models"][model]["curves"], curves.curves()[model]
        for name, kind in (("teal_greedy inputs", "up_in"), ("scap down", "down_in"), ("cats neurons", "gate")):
            assert found[name]["points"][0][6] == pytest.approx(stored[name].points[0].sites[kind], rel=1e-3)
