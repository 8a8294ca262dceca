"""Recipes: JSON round trips, and everything that is refused at the door."""

import dataclasses
import json

import pytest
import torch
from core_tiny import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_lib import Recipe, Rule, SparsityError, find_sites, recipes, weights_per_token
from sparsity_lib.errors import shown
from sparsity_lib.methods import METHODS, VARIANTS
from sparsity_lib.methods.larosa import density_for_share
from sparsity_lib.parts import REGISTRY
from sparsity_lib.parts.saliency import STATISTICS, Saliency
from sparsity_lib.parts.scores import ColumnNorm, Oracle, Random
from sparsity_lib.parts.select import Threshold, TopK
from sparsity_lib.parts.transforms import Rotate
from sparsity_lib.sites import KINDS

EVERY = [make(0.37, token_share=0.25) for make in METHODS.values()]
EVERY += [recipes.claws(0.2, variant=v) for v in VARIANTS]
EVERY += [recipes.larosa(0.6, inputs=0.8, outputs=1.2, damping=0.1), recipes.random(0.5, seed=7)]
EVERY += [Recipe("wina", (Rule("up_in", Threshold(0.5), ColumnNorm(), Rotate()), Rule("o_in", TopK(0.5), ColumnNorm())))]

HUGE = pytest.param(10**400, id="10**400")
BAD_DENSITIES = [0, 0.0, 1.5, -0.1, float("nan"), float("inf"), -float("inf"), "0.5", True, False, None, [0.5], {}, HUGE, 1j]


@pytest.mark.parametrize("recipe", EVERY, ids=lambda r: r.method)
def test_json_round_trip(recipe):
    text = recipe.dumps()
    again = Recipe.from_json(text)
    assert again == recipe and again.dumps() == text
    assert Recipe.from_json(json.loads(text)) == recipe == Recipe.from_json(text.encode())
    assert {rule["site"] for rule in recipe.to_json()["rules"]} == {rule.site for rule in recipe.rules}


def test_the_defaults_need_not_be_written():
    short = {"method": "cats", "rules": [{"site": "gate", "select": {"kind": "threshold", "density": 0.5}}]}
    assert Recipe.from_json(short) == recipes.cats(0.5)


@pytest.mark.parametrize("bad", BAD_DENSITIES, ids=str)
@pytest.mark.parametrize("make", [*METHODS.values(), TopK, Threshold, recipes.cats().with_density],
                         ids=[*METHODS, "TopK", "Threshold", "with_density"])
def test_bad_densities_are_refused_by_name_value_and_range(make, bad):
    with pytest.raises(SparsityError) as error:
        make(bad)
    assert f"density = {shown(bad)} is not allowed" in str(error.value) and "(0, 1]" in str(error.value)


@pytest.mark.parametrize("bad", BAD_DENSITIES, ids=str)
def test_bad_token_shares_are_refused(bad):
    with pytest.raises(SparsityError, match=r"token_share = .* not allowed.*\(0, 1\]"):
        recipes.cats(0.5, token_share=bad)


@pytest.mark.parametrize("bad", BAD_DENSITIES, ids=str)
def test_bad_densities_in_json_are_refused(bad):
    data = recipes.claws(0.5).to_json()
    data["rules"][0]["select"]["density"] = bad
    with pytest.raises(SparsityError, match=r"density = .*\(0, 1\]"):
        Recipe.from_json(data)


@pytest.mark.parametrize("good", [1e-9, 0.5, 1, 1.0])
def test_good_densities(good):
    for make in METHODS.values():
        assert make(good).with_density(0.25).rules[0].select.density == 0.25


CLAWS = recipes.claws(0.5).to_json


def changed(path, value):
    data = CLAWS()
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return data


@pytest.mark.parametrize(("path", "value", "message"), [
    (("densty",), 1, "field of a recipe = 'densty' is unknown.*method, rules, token_share"),
    (("method",), 3, "method = 3"),
    (("method",), "", "method = ''"),
    (("rules",), None, "rules = None.*a list"),
    (("rules",), {}, "rules = {}.*a list"),
    (("rules",), [], "at least one rule"),
    (("rules", 0), "gate", "rule = 'gate'.*an object"),
    (("rules", 0, "sight"), 1, "field of a rule = 'sight' is unknown.*did you mean 'site'"),
    (("rules", 0, "site"), "gates", "site = 'gates' is unknown.*did you mean 'gate'"),
    (("rules", 0, "site"), ["gate"], "site = .* is unknown"),
    (("rules", 0, "score"), {"kind": "salience"}, "score kind = 'salience' is unknown.*did you mean 'saliency'"),
    (("rules", 0, "score"), {"kind": ["x"]}, "score kind = .* is unknown"),
    (("rules", 0, "score"), {"kind": {}}, "score kind = .* is unknown"),
    (("rules", 0, "score"), {"statistic": "rms"}, 'score = .*"kind"'),
    (("rules", 0, "score"), None, 'score = None.*"kind"'),
    (("rules", 0, "score", "statistic"), "max", "statistic = 'max' is unknown.*median"),
    (("rules", 0, "score", "statistic"), ["rms"], "statistic = .* is unknown"),
    (("rules", 0, "score", "power"), -1, "power = -1.*above 0"),
    (("rules", 0, "score", "skip_first"), 1, "skip_first = 1.*true or false"),
    (("rules", 0, "score", "exponent"), 2, "parameter of score 'saliency' = 'exponent' is unknown"),
    (("rules", 0, "select"), {"kind": "topk"}, "select 'topk' lacks the parameter 'density'"),
    (("rules", 0, "select"), {"kind": "magnitude"}, "select kind = 'magnitude' is unknown"),
    (("rules", 0, "transform"), {"kind": "rotate", "damping": 0}, "damping = 0.*above 0"),
    (("rules", 0, "repair"), None, "repair = None.*a list"),
    (("rules", 0, "repair"), 3, "repair = 3.*a list"),
    (("rules", 0, "repair"), [{"kind": "lora"}], "repair kind = 'lora' is unknown"),
])
def test_bad_fields_are_refused_by_name(path, value, message):
    with pytest.raises(SparsityError, match=message):
        Recipe.from_json(changed(path, value))


@pytest.mark.parametrize("missing", ["site", "select"])
def test_a_rule_needs_its_site_and_its_selection(missing):
    data = CLAWS()
    del data["rules"][0][missing]
    with pytest.raises(SparsityError, match="lacks"):
        Recipe.from_json(data)


@pytest.mark.parametrize("text", ["", "{", b"\xff\xfe", "[]", "3", "null", '"x"', "NaN", "[" * 100_000])
def test_text_that_is_no_recipe_is_refused(text):
    with pytest.raises(SparsityError, match="recipe"):
        Recipe.from_json(text)


def test_contradictory_rules_are_refused():
    gate, down = Rule("gate", TopK(0.5)), Rule("down_in", TopK(0.5))
    with pytest.raises(SparsityError, match="2 rules for site 'gate'"):
        Recipe("twice", (gate, gate))
    with pytest.raises(SparsityError, match="twice, by 'gate' and by 'down_in'"):
        Recipe("both", (gate, down))
    with pytest.raises(SparsityError, match=r"site of score 'oracle' = 'down_in'.*gate"):
        Rule("down_in", TopK(0.5), Oracle())
    with pytest.raises(SparsityError, match="score = .*a Score part"):
        Rule("gate", TopK(0.5), TopK(0.5))
    with pytest.raises(SparsityError, match="select = None"):
        Rule("gate", None)


def test_other_parameters_are_checked():
    with pytest.raises(SparsityError, match="variant = 'fischer' is unknown.*did you mean 'fisher'"):
        recipes.claws(variant="fischer")
    for bad in (-1, 0.5, True, "0", None, 10**30):
        with pytest.raises(SparsityError, match="seed"):
            Random(bad)
    for bad in (0, -1.0, float("nan"), "1", None, True, 10**400):
        with pytest.raises(SparsityError, match="power"):
            Saliency(power=bad)
        with pytest.raises(SparsityError, match="inputs"):
            recipes.larosa(0.5, inputs=bad)
    with pytest.raises(SparsityError, match="leaves nothing"):
        recipes.larosa(0.1, outputs=1.2)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8,
)
NAMES = st.sampled_from(sorted({n for kinds in REGISTRY.values() for n in kinds} | set(STATISTICS)))
FIELDS = {f.name for kinds in REGISTRY.values() for cls in kinds.values() for f in dataclasses.fields(cls)}
VALUE = JSON | NAMES | st.sampled_from([0.5, 1, 10**400, "rms", True])


def objects(names, value):
    return st.dictionaries(st.sampled_from(sorted(names)), value, max_size=5)


PART = objects({"kind", *FIELDS}, VALUE) | JSON
RULE = st.fixed_dictionaries({"site": st.sampled_from(KINDS) | JSON, "select": PART}, optional={
    "score": PART, "transform": PART, "repair": st.lists(PART, max_size=2) | JSON,
})
NEARLY = st.fixed_dictionaries({"method": st.text() | JSON, "rules": st.lists(RULE | JSON, max_size=3)},
                               optional={"token_share": VALUE})


@settings(max_examples=150, deadline=None)
@given(JSON | NEARLY | st.text() | st.binary(max_size=20))
def test_arbitrary_data_is_read_whole_or_refused(data):
    try:
        recipe = Recipe.from_json(data)
    except SparsityError:
        return
    assert Recipe.from_json(recipe.dumps()) == recipe


def test_the_share_skipped_by_design_and_its_inverse():
    model = tiny("llama")
    sites, total = find_sites(model), weights_per_token(model)
    for make in (recipes.cats, recipes.larosa):
        assert make(1.0).skipped(sites, total) == 0
        density = density_for_share(make, model, 0.2)
        step = 0 if make is recipes.cats else 1 / 32  # top-k moves by whole entries of at least 32
        assert make(density).skipped(sites, total) == pytest.approx(0.2, abs=step + 1e-9)
    with pytest.raises(SparsityError, match="cannot be skipped"):
        density_for_share(recipes.cats, model, 0.9)


def test_one_density_cannot_stand_for_several():
    with pytest.raises(SparsityError, match="different densities.*inputs="):
        recipes.larosa(0.6, inputs=0.8, outputs=1.2).with_density(0.5)


def test_a_huge_power_stays_finite():
    collector = type("Given", (), {"result": lambda self: {"rms": torch.tensor([1e-9, 1.0, 3e8])}})()
    c = Saliency(power=200.0).fit(collector, None)["saliency"]
    assert c.isfinite().all() and c.argmax() == 2
