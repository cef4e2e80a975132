# SPDX-License-Identifier: Apache-2.0
"""LoRSConfig: its fields, their refusals, and patterns as in PEFT."""

from __future__ import annotations

import json
import math

import pytest

from lors_cuda.config import LoRSConfig, pattern_matches
from models import refused

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("fields", "exception", "fragment"),
    [
        ({"r": 0}, ValueError, "r must be an integer of at least 1, but is 0"),
        ({"r": -3}, ValueError, "but is -3"),
        ({"r": 2.0}, TypeError, "r must be an integer"),
        ({"r": True}, TypeError, "r must be an integer"),
        ({"r": "8"}, TypeError, "but is '8'"),
        ({"lora_alpha": math.inf}, ValueError, "lora_alpha must be finite, but is inf"),
        ({"lora_alpha": math.nan}, ValueError, "lora_alpha must be finite"),
        ({"lora_alpha": "16"}, TypeError, "lora_alpha must be a number"),
        ({"layout": "csr"}, ValueError, "layout is 'csr'; it must be 'auto', 'dense', '2:4' or 'bitmap'"),
        ({"layout": None}, ValueError, "layout is None; it must be"),
        ({"gradient": "true"}, ValueError, "gradient is 'true'; it must be 'lors' or 'exact'"),
        ({"use_rslora": 1}, TypeError, "use_rslora must be True or False"),
        ({"init_lora_weights": "pissa"}, TypeError, "init_from_gradients"),
        ({"target_modules": []}, ValueError, "target_modules must be 'all-linear'"),
        ({"target_parameters": "experts.down_proj"}, TypeError, "target_parameters must be a list"),
        ({"target_parameters": [3]}, TypeError, "target_parameters must hold non-empty module names"),
        ({"target_modules": 5}, TypeError, "target_modules must be a list"),
        ({"target_modules": ["q_proj", 3]}, TypeError, "but holds 3"),
        ({"target_modules": ["q_proj", ""]}, TypeError, "non-empty"),
        ({"target_modules": "(q_proj"}, ValueError, "not valid"),
        ({"exclude_modules": {"a": 1}}, TypeError, "exclude_modules must be a list"),
        ({"modules_to_save": "lm_head"}, TypeError, "list of module names, but is the string 'lm_head'"),
        ({"rank_pattern": {"q_proj": 0}}, ValueError, "rank_pattern['q_proj'] must be an integer of at least 1"),
        ({"rank_pattern": ["q_proj"]}, TypeError, "rank_pattern must be a dict"),
        ({"rank_pattern": {"[": 4}}, ValueError, "not valid"),
        ({"rank_pattern": {3: 4}}, TypeError, "regular expression as a string"),
        ({"alpha_pattern": {"q_proj": math.nan}}, ValueError, "alpha_pattern['q_proj'] must be finite"),
    ],
)
def test_a_wrong_field_is_refused_with_a_sentence(fields, exception, fragment):
    message = refused(exception, lambda: LoRSConfig(**fields), fragment)
    assert message.endswith(".")


def test_defaults_are_the_documented_ones():
    config = LoRSConfig()
    assert (config.r, config.lora_alpha, config.target_modules, config.exclude_modules) == (16, 16, "all-linear", None)
    assert (config.layout, config.gradient, config.use_rslora, config.init_lora_weights) == (
        "auto",
        "lors",
        False,
        True,
    )
    assert (config.rank_pattern, config.alpha_pattern, config.modules_to_save) == ({}, {}, None)


def test_round_trip_through_json():
    config = LoRSConfig(
        r=4,
        lora_alpha=2.5,
        target_modules={"v_proj", "q_proj"},
        exclude_modules=("lm_head",),
        rank_pattern={"q_proj": 2},
        alpha_pattern={"^model": 3.0},
        modules_to_save=["norm"],
        gradient="exact",
        use_rslora=True,
    )
    assert config.target_modules == ["q_proj", "v_proj"]
    assert LoRSConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_to_dict_shares_nothing_with_the_configuration():
    config = LoRSConfig(rank_pattern={"q_proj": 2})
    config.to_dict()["rank_pattern"]["q_proj"] = 99
    assert config.rank_pattern == {"q_proj": 2}


def test_from_dict_names_an_unknown_field():
    refused(ValueError, lambda: LoRSConfig.from_dict({"rank": 4}), "no field 'rank'", "lora_alpha")
    refused(TypeError, lambda: LoRSConfig.from_dict(["r"]), "needs a mapping", "list")


def test_from_dict_reads_what_had_products():
    assert LoRSConfig.from_dict({"r": 4, "products": "sparse"}) == LoRSConfig(r=4)


PATTERNS = ["q_proj", "self_attn.q_proj", r"layers\.0\..*", r".*\.0\.self_attn.*", "^q_proj", "proj", "a|q_proj", "0.q"]
NAMES = [Q_PROJ, "q_proj", "model.layers.10.q_proj", "model.q_proj.x", "xq_proj", "layers.0.up", "a"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_patterns_match_as_in_peft(pattern, name):
    other = pytest.importorskip("peft.utils.other")
    expected = other.get_pattern_key([pattern], name) == pattern and pattern != name
    if pattern == name:
        expected = True  # there PEFT's answer does not tell a match from its fallback
    assert pattern_matches(pattern, name) == expected


def test_the_first_matching_pattern_wins():
    config = LoRSConfig(r=4, rank_pattern={r"layers\.0\..*": 2, "q_proj": 8}, alpha_pattern={"q_proj": 3})
    assert [config.rank_of(Q_PROJ), config.alpha_of(Q_PROJ)] == [2, 3]
    assert [config.rank_of("layers.1.q_proj"), config.rank_of("layers.1.k_proj")] == [8, 4]
    assert config.alpha_of("layers.1.k_proj") == 16
