"""One list of options: whole or refused, before anything is loaded or read."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
from corpus import DOCUMENTS, FEW_SHOT

from cribsheet import BuildOptions, CompressedKnowledgeLLM, build_sheet
from cribsheet.errors import BudgetError, CribsheetError
from cribsheet.forecast import forecast


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rate": 0.5}, r"The rate is 0\.5; pass at least 1"),
        ({"rate": 4, "budget": 10}, "Both rate 4 and budget 10 were given; pass one of them"),
        ({"budget": 1.5}, r"budget is 1\.5; pass a whole number of tokens"),
        ({"seed": True}, "seed is True; pass a whole number"),
        ({"seed": -(1 << 63) - 1}, r"pass a whole number from -2\^63"),
        ({"guide": "both"}, "guide is 'both'; use auto, resident, form, dropped"),
        ({"allocation": "all"}, "allocation is 'all'; use uniform, profiled, adaptive"),
        ({"correction": "some"}, "correction is 'some'; use none, refit"),
        ({"mode": "apart"}, "mode is 'apart'; use sequential, independent"),
        ({"dtype": "int3"}, "no storage dtype 'int3'; use float32, bfloat16, float16, int8, int4"),
        ({"scorer": "best"}, "There is no scorer 'best'; use one of recall"),
        ({"scorer": "recent", "correction": "refit"}, "use another, or correction='none'"),
        ({"scorer": "finch", "allocation": "adaptive"}, "all heads of a layer keep the same tokens"),
        ({"mode": "independent", "allocation": "profiled"}, "use allocation='adaptive'"),
        ({"mode": "independent", "correction": "refit"}, "use correction='none'"),
        ({"retain": 1.5}, r"retain is 1\.5; pass a share above 0 and at most 1"),
        ({"retain": 0.9, "rate": 4}, r"Both retain 0\.9 and rate 4 were given"),
        ({"retain": 0.9, "mode": "independent"}, "or mode='sequential'"),
        ({"retain": 0.9, "correction": "refit"}, "with correction and check=True"),
        ({"for_engines": True, "budget": 100}, "blocks of 16; with for_engines=True pass 96 or 112"),
        ({"for_engines": True, "budget": 7}, "with for_engines=True pass 16"),
        ({"for_engines": True, "allocation": "adaptive"}, "allocation='adaptive' was given with for_engines=True"),
        ({"for_engines": True, "mode": "independent"}, "mode='independent' was given with for_engines=True"),
        ({"for_engines": True, "dtype": "int4"}, "dtype='int4' was given with for_engines=True"),
        ({"for_engines": True, "retain": 0.9}, "retain=0.9 was given with for_engines=True"),
        ({"for_engines": True, "rate": 1}, "rate=1 was given with for_engines=True, .* leave one of the two out"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_with_the_way_out_by_every_door(tiny, options, said):
    with pytest.raises(CribsheetError, match=said):
        BuildOptions(**options)
    for door in (build_sheet, forecast):
        with pytest.raises(CribsheetError, match=said):
            door(tiny, DOCUMENTS, FEW_SHOT, **options)
    with pytest.raises(CribsheetError, match=said):
        CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model="no-such-model-is-looked-for", **options)


def test_names_that_are_no_options_are_refused_with_all_that_are(tiny):
    for door in (build_sheet, forecast):
        with pytest.raises(TypeError, match=r"Unknown options of a build: rat; use allocation, .*, rate, retain"):
            door(tiny, DOCUMENTS, FEW_SHOT, rat=3)
    with pytest.raises(TypeError, match=r"Unknown options of a build: rat; use .*, or what the function itself takes"):
        CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model="no-such-model-is-looked-for", rat=3)


def test_options_are_never_changed_and_say_what_stands_for_what_was_left_open(tiny):
    options = BuildOptions()
    with pytest.raises(FrozenInstanceError):
        options.rate = 2
    assert (options.chosen_scorer, options.chosen_allocation, options.storage(tiny)) == ("recall", "profiled", "int4")
    apart = BuildOptions(mode="independent")
    assert (apart.chosen_allocation, apart.storage(tiny)) == ("adaptive", "int4")
    assert BuildOptions(scorer="finch").chosen_allocation == "uniform"
    assert BuildOptions(retain=0.9).storage(tiny) == BuildOptions(rate=4).storage(tiny) == "float32"
    assert BuildOptions(rate=4, mode="independent").storage(tiny) == "float32"


def test_a_forecast_refuses_what_asks_questions(tiny):
    for options in ({"retain": 0.9}, {"check": True}):
        with pytest.raises(BudgetError, match="leave retain and check out"):
            forecast(tiny, DOCUMENTS, FEW_SHOT, **options)
