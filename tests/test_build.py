"""From documents and a task to a sheet: what is planned, what is refused, what the sheet says of itself."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from corpus import DOCUMENTS, FEW_SHOT, QUESTION, ZERO_SHOT
from reference import full_context_logits, stock_cache

from cribsheet import CompressedKnowledgeLLM, Task, build_sheet
from cribsheet.attention.cache import prefix_cache
from cribsheet.compress.scoring import Reads
from cribsheet.corpus.documents import Document
from cribsheet.errors import BudgetError, CribsheetError, DocumentError, SheetError, TemplateError
from cribsheet.plan.options import BuildOptions
from cribsheet.prompt.template import ChatLayout
from cribsheet.sheet.manifest import Manifest
from cribsheet.testing import tiny_backbone


@pytest.fixture(scope="module", params=["llama", "qwen3", "phi3"])
def family(request):
    return tiny_backbone(request.param)


def build(backbone, task=FEW_SHOT, documents=DOCUMENTS, **options):
    return build_sheet(backbone, documents, task, **{"rate": 3, "scorer": "task", **options})


def test_a_rate_says_how_many_times_shorter_the_sheet_is_the_guide_included(tiny):
    for guide in ("dropped", "resident"):
        sheet = build(tiny, rate=2, guide=guide)
        assert sheet.tokens == sheet.manifest.budget == sheet.manifest.corpus_tokens // 2
        assert sheet.indices.shape == (3, 2, sheet.tokens)
        assert {tuple(layer.keys.shape) for layer in sheet.layers} == {(2, sheet.tokens, 16)}


def test_a_budget_is_kept_to_the_token(tiny):
    assert [build(tiny, rate=None, budget=budget, guide="dropped").tokens for budget in (25, 40, 101)] == [25, 40, 101]


def test_a_dropped_guide_leaves_no_trace(tiny):
    sheet = build(tiny, guide="dropped")
    assert sheet.manifest.guide == "dropped" and not sheet.resident
    assert sheet.manifest.guide_tokens == 0 and (sheet.indices >= 0).all()


def test_a_resident_guide_is_what_the_model_reads_on_top_of_the_kept_tokens(family):
    sheet = build(family, rate=1.5, guide="resident")
    dropped = build(family, rate=None, budget=sheet.tokens - sheet.manifest.guide_tokens, guide="dropped")
    layout = ChatLayout(family.tokenizer)
    guide = layout.encoder.after(layout.guide(FEW_SHOT).resident, continues=True)
    assert len(guide) == sheet.manifest.guide_tokens > 0
    assert (sheet.indices[..., -len(guide) :] == -1).all()
    before = [layer.restored(family.device, family.dtype) for layer in dropped.layers]
    read = family.read(before, dropped.tokens, guide, guide[:0])
    for whole, kept, fresh in zip(sheet.layers, dropped.layers, read, strict=True):
        torch.testing.assert_close(whole.keys, torch.cat([kept.keys, fresh.chunk_keys], 1), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(whole.values, torch.cat([kept.values, fresh.chunk_values], 1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("task", [ZERO_SHOT, FEW_SHOT])
def test_a_full_sheet_with_a_resident_guide_is_the_whole_conversation(family, task):
    """A full sheet that is read on with the guide."""
    layout = ChatLayout(family.tokenizer)
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, task, model=family, rate=1, guide="dropped")
    guide = layout.encoder.after(layout.guide(task).resident, continues=True)
    question = layout.encoder.after(layout.question([{"role": "user", "content": QUESTION}], task, True))
    left = layout.encoder.left(layout.preamble(task.instruction) + "\n\n".join(d.text for d in DOCUMENTS) + "\n\n")[0]
    rest = torch.cat([guide, question])
    read = family.read(kb.prefix.layers, kb.prefix.tokens, guide, question)
    stock = stock_cache(family, torch.cat([left, rest]))
    torch.testing.assert_close(read[-1].guide_keys, stock.layers[-1].keys[0, :, -len(question) :], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("mode", ["sequential", "independent"])
def test_rate_1_is_the_ceiling_of_the_same_prompt_guide_included(family, mode):
    if mode == "independent":  # of one document: several do not see each other
        documents = [Document("\n\n".join(each.text for each in DOCUMENTS), "all")]
    kb = CompressedKnowledgeLLM.build(
        DOCUMENTS if mode == "sequential" else documents, FEW_SHOT, model=family, rate=1, guide="resident", mode=mode
    )
    layout = ChatLayout(family.tokenizer)
    left = layout.preamble(FEW_SHOT.instruction) + "\n\n".join(d.text for d in DOCUMENTS) + "\n\n"
    question = layout.question([{"role": "user", "content": QUESTION}], FEW_SHOT, True)
    corpus, rest = layout.encoder.left(left)[0], layout.encoder.after(layout.guide(FEW_SHOT).resident + question)
    told = kb.sheet.manifest.guide_tokens
    assert kb.sheet.tokens == len(corpus) + told and told > 20
    ids = torch.cat([corpus, rest])
    cache = prefix_cache(kb.prefix.layers, kb.prefix.tokens)
    positions = torch.arange(kb.prefix.tokens, len(ids)).unsqueeze(0)
    logits = family.step(rest[told:].unsqueeze(0), positions, cache, keep=len(rest) - told)[0]
    torch.testing.assert_close(logits, full_context_logits(family, ids)[kb.prefix.tokens :], atol=2e-3, rtol=1e-3)


def test_auto_keeps_a_guide_that_takes_at_most_a_quarter_of_the_budget(tiny):
    tokens = build(tiny, ZERO_SHOT, guide="resident", rate=1.2).manifest.guide_tokens
    assert build(tiny, ZERO_SHOT, rate=None, budget=4 * tokens, guide="auto").resident
    assert not build(tiny, ZERO_SHOT, rate=None, budget=4 * tokens - 1, guide="auto").resident
    assert build(tiny, ZERO_SHOT, rate=1, guide="auto").resident  # on top of everything, so it costs nothing
    whole = build(tiny, ZERO_SHOT, rate=1, guide="dropped").tokens
    assert not build(tiny, ZERO_SHOT, rate=None, budget=whole, guide="auto").resident


@pytest.mark.parametrize("mode", ["sequential", "independent"])
def test_at_rate_1_nothing_is_scored_and_the_guide_comes_on_top(tiny, mode):
    class Unasked:
        reads = Reads(task=True, repetition=True)
        pins_preamble = True

        def score(self, view):
            pytest.fail("there is nothing to choose")

    whole, own = (
        build(tiny, FEW_SHOT, scorer=scorer, rate=1, mode=mode, guide="resident", allocation="uniform")
        for scorer in ("recall", Unasked())
    )
    assert whole.manifest.scorer == "recall" and own.manifest.scorer == "Unasked"
    assert own.tokens == own.length == own.manifest.corpus_tokens + own.manifest.guide_tokens
    assert own.rate < 1 and torch.equal(own.indices, whole.indices)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(own.layers, whole.layers, strict=True))


def test_a_corpus_that_fills_the_window_nearly_is_kept_whole_in_chunks_of_any_size():
    backbone = tiny_backbone("llama", max_position_embeddings=300)
    whole = build(backbone, ZERO_SHOT, rate=1)
    assert whole.tokens == whole.manifest.corpus_tokens + whole.manifest.guide_tokens > 200
    small = build(backbone, ZERO_SHOT, rate=1, chunk_tokens=40)
    torch.testing.assert_close(small.layers[-1].keys, whole.layers[-1].keys, atol=2e-4, rtol=1e-3)
    with pytest.raises(BudgetError, match=r"takes \d+ tokens and the guide \d+ of the model's window of 230"):
        build(tiny_backbone("llama", max_position_embeddings=230), ZERO_SHOT, rate=1, guide="resident")


def test_nothing_is_corrected_where_nothing_was_dropped(tiny):
    plain, corrected = (build(tiny, FEW_SHOT, rate=1, scorer="recall", correction=each) for each in ("none", "refit"))
    assert corrected.manifest.correction == "none"
    assert torch.equal(plain.layers[0].values, corrected.layers[0].values)


def test_where_examples_take_too_much_their_form_stays_without_their_words(tiny):
    many = [Document(text=f"{document.text} {n}.", id=f"{document.id}-{n}") for document in DOCUMENTS for n in range(6)]
    task = Task(
        FEW_SHOT.description, [("Where does Bob Smith live, and since when?", "Oslo"), ("Where is Eve?", "Rome")] * 2
    )
    whole = build(tiny, task, many, guide="resident", rate=1.5).manifest
    short = build(tiny, task, many, guide="form", rate=1.5)
    assert whole.form == "" and 0 < short.manifest.guide_tokens < whole.guide_tokens
    assert short.manifest.form == task.form and short.task == task and short.shown_task == task.shown(task.form)
    kept = {
        budget: build(tiny, task, many, rate=None, budget=budget, guide="auto").manifest
        for tokens in (whole.guide_tokens, short.manifest.guide_tokens)
        for budget in (4 * tokens, 4 * tokens - 1)
    }
    assert [(made.guide, made.form) for made in kept.values()] == [
        ("resident", ""), ("resident", task.form), ("resident", task.form), ("dropped", "")
    ]  # fmt: skip
    made = build(tiny, task, many, rate=None, budget=whole.corpus_tokens, guide="auto").manifest
    assert (made.guide, made.form) == ("dropped", "")
    made = build(tiny, task, many, rate=1, guide="auto").manifest  # on top of everything, so it costs nothing
    assert (made.guide, made.form) == ("resident", "")


def test_a_question_follows_the_guide_that_its_sheet_was_built_with(tiny, tmp_path):
    """Also after loading, and of sheets of earlier versions, whose manifests say nothing of a form."""
    layout = ChatLayout(tiny.tokenizer)
    for guide, shown in (("resident", FEW_SHOT), ("form", FEW_SHOT.shown(FEW_SHOT.form))):
        kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny, rate=1.2, guide=guide)
        preamble = layout.preamble(shown.instruction)
        left = preamble + "\n\n".join(document.text for document in DOCUMENTS) + "\n\n"
        resident = layout.guide(shown).resident
        loaded = CompressedKnowledgeLLM.load(kb.save(tmp_path / f"{guide}.sheet"), model=tiny)
        asked = layout.encoder.after(layout.question([{"role": "user", "content": QUESTION}], shown, True))
        assert loaded.question_tokens(QUESTION).equal(asked)
        assert loaded.ask(QUESTION, max_tokens=8).text == kb.ask(QUESTION, max_tokens=8).text
        assert kb.sheet.manifest.guide_tokens == len(layout.encoder.after(resident, continues=True))
        layout.verify(preamble, left[len(preamble) : -2], resident, shown)
        told = loaded.sheet.manifest.model_dump()
        assert told.pop("form") == ("" if guide == "resident" else FEW_SHOT.form)
    told["guide"] = "resident"
    assert Manifest(**told).form == ""
    assert "Oslo" not in resident and "Bob" not in resident


def test_the_form_of_examples_is_read_again_behind_passages(tiny):
    kb = CompressedKnowledgeLLM.build(DOCUMENTS, FEW_SHOT, model=tiny, rate=1.2, guide="form")
    answer = kb.ask(QUESTION, retriever="bm25", mode="hybrid", passage_tokens=60, max_tokens=4)
    assert answer.mode == "hybrid" and answer.usage.completion_tokens == 4


def test_the_storage_type_is_the_model_s_own_unless_another_is_asked(tiny):
    assert {layer.keys.dtype for layer in build(tiny).layers} == {torch.float32}
    small = build(tiny, dtype="bfloat16")
    assert {layer.values.dtype for layer in small.layers} == {torch.bfloat16}
    assert small.manifest.dtype == "bfloat16" and small.nbytes * 2 == build(tiny).nbytes
    half = tiny_backbone(dtype=torch.bfloat16)
    assert build(half).manifest.dtype == "bfloat16"


REFUSALS = {
    "both": (
        {"rate": 2, "budget": 40},
        r"Both rate 2 and budget 40 were given; pass one of them",
    ),
    "rate below one": ({"rate": 0.5}, r"The rate is 0\.5; pass at least 1 \(16 means sixteen times shorter\)"),
    "rate nan": ({"rate": float("nan")}, r"The rate is nan"),
    "rate infinite": ({"rate": float("inf")}, r"The rate is inf"),
    "rate too high": ({"rate": 1000}, r"The budget is 0 tokens but the corpus has \d+; pass a budget between 1 and"),
    "budget zero": ({"rate": None, "budget": 0}, r"The budget is 0 tokens"),
    "budget negative": ({"rate": None, "budget": -3}, r"The budget is -3 tokens"),
    "budget above": ({"rate": None, "budget": 100_000}, r"The budget is 100000 tokens but the corpus has \d+"),
    "budget below the preamble": (
        {"rate": None, "budget": 2},
        r"the template's preamble takes \d+; pass a budget of at least \d+ or a lower rate\.$",
    ),
    "budget below the guide": (
        {"rate": None, "budget": 30, "guide": "resident"},
        r"the resident guide \d+; pass a budget of at least \d+, a lower rate, a shorter task, or guide='dropped'",
    ),
    "guide": ({"guide": "kept"}, r"guide is 'kept'; use auto, resident, form, dropped"),
    "dtype": ({"dtype": "int3"}, r"There is no storage dtype 'int3'; use float32, bfloat16, float16, int8, int4"),
    "chunk": ({"chunk_tokens": -1}, r"A chunk of -1 tokens does not fit"),
    "scorer": ({"scorer": "none"}, r"There is no scorer 'none'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_before_any_work(tiny, monkeypatch, name):
    options, message = REFUSALS[name]
    monkeypatch.setattr(tiny.model, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(CribsheetError, match=message):
        build(tiny, **options)


def test_the_least_budget_that_an_error_names_is_accepted(tiny):
    for guide in ("dropped", "resident"):
        with pytest.raises(BudgetError) as refused:
            build(tiny, rate=None, budget=2, guide=guide)
        least = int(str(refused.value).split("at least ")[1].replace(",", " ").split()[0])
        assert build(tiny, rate=None, budget=least, guide=guide).tokens == least
        with pytest.raises(BudgetError):
            build(tiny, rate=None, budget=least - 1, guide=guide)


def test_a_chunk_beyond_the_window_is_refused_and_the_largest_that_fits_is_named(tiny):
    small = tiny_backbone(max_position_embeddings=150)
    with pytest.raises(BudgetError, match=r"A chunk of \d+ tokens does not fit: the model's window is 150") as refused:
        build(small, rate=4, chunk_tokens=0)
    room = int(str(refused.value).split("between 1 and ")[1].rstrip("."))
    assert build(small, rate=4, chunk_tokens=room).manifest.chunk_tokens == room
    with pytest.raises(BudgetError):
        build(small, rate=4, chunk_tokens=room + 1)


def test_a_corpus_longer_than_the_window_is_condensed_by_default():
    small = tiny_backbone(max_position_embeddings=150)
    sheet = build(small, rate=4, guide="dropped")
    assert sheet.manifest.corpus_tokens > 150 and sheet.manifest.chunk_tokens < 150


def test_a_budget_that_fills_the_window_is_refused():
    small = tiny_backbone(max_position_embeddings=100)
    with pytest.raises(BudgetError, match="leave no room for a chunk in the model's window of 100"):
        build(small, rate=None, budget=100, guide="dropped")


def test_a_chunk_larger_than_the_corpus_is_the_corpus(tiny):
    sheet = build(tiny, chunk_tokens=4_000_000)
    assert sheet.manifest.chunk_tokens == sheet.manifest.corpus_tokens


def test_no_documents_are_refused(tiny):
    with pytest.raises(DocumentError, match="There are no documents"):
        build(tiny, documents=[])


def test_a_template_that_rewrites_is_refused_before_any_work(monkeypatch):
    backbone = tiny_backbone()
    backbone.tokenizer.chat_template = "{% for m in messages %}{{ m.content | replace('Lisbon', '') }}{% endfor %}"
    monkeypatch.setattr(backbone.model, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(TemplateError):
        build(backbone)


def test_progress_is_told_at_the_start_and_after_each_chunk(tiny):
    told = []
    sheet = build(tiny, chunk_tokens=50, progress=lambda done, total: told.append((done, total)))
    total = sheet.manifest.corpus_tokens
    assert told == [(min(done, total), total) for done in range(0, total + 50, 50)]


def test_building_leaves_the_random_numbers_of_the_caller_alone(tiny):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build(tiny, scorer="random", seed=9)
    assert torch.equal(torch.rand(3), expected)


def test_the_manifest_says_what_the_sheet_was_made_with(tiny):
    documents = [*DOCUMENTS, Document(text="Ida Lund.", id="ida", metadata={"path": Path("a"), "n": 3})]
    sheet = build(
        tiny, documents=documents, system="Be brief.", chunk_tokens=50, seed=4, scorer="task", guide="resident", rate=2
    )
    made = sheet.manifest
    assert (made.system, made.chunk_tokens, made.seed, made.scorer) == ("Be brief.", 50, 4, "task")
    assert made.head.startswith("<|bos|><|system|>Be brief.<|end|><|user|>Answer from the documents.")
    assert made.task == FEW_SHOT.to_dict() and sheet.task == FEW_SHOT
    assert [entry.id for entry in made.documents] == ["alice", "bob", "clara", "hugo", "ida"]
    assert [entry.characters for entry in made.documents] == [len(document.text) for document in documents]
    assert made.documents[-1].metadata == {"path": "a", "n": 3}
    gaps = 2 * len(documents)
    assert sum(entry.tokens for entry in made.documents) + made.head_tokens + gaps == made.corpus_tokens
    assert made.fingerprint.model == "tiny-llama" and made.build["device"] == "cpu"


def test_the_digest_changes_with_ids_texts_and_where_one_ends(tiny):
    def digest(*pairs):
        documents = [Document(text=text, id=name) for name, text in pairs]
        return build(tiny, ZERO_SHOT, documents, rate=1).manifest.corpus_digest

    digests = [
        digest(("a", "Alice lives in Rome."), ("b", "Bob too.")),
        digest(("a", "Alice lives in Rome."), ("c", "Bob too.")),
        digest(("a", "Alice lives in Rome. Bob"), ("b", "too.")),
        digest(("b", "Bob too."), ("a", "Alice lives in Rome.")),
    ]
    assert len(set(digests)) == 4


def test_kept_tokens_are_traced_to_documents_and_characters(tiny):
    sheet = build(tiny, rate=1, guide="dropped")
    spans = {}
    for span in sheet.spans():
        assert span.kept == 1.0
        spans.setdefault(span.document_id, []).append((span.start, span.stop))
    assert spans == {document.id: [(0, len(document.text))] for document in DOCUMENTS}
    assert sheet.kept_per_document() == {entry.id: entry.tokens for entry in sheet.manifest.documents}


def test_shares_add_up_to_the_kept_tokens(tiny):
    sheet = build(tiny, ZERO_SHOT, rate=3, guide="resident", chunk_tokens=40)
    corpus_part = sheet.tokens - sheet.manifest.guide_tokens
    assert float(sheet.kept_share.sum()) == pytest.approx(corpus_part)
    for (index, number, start, stop), share in zip(sheet.origins.tolist(), sheet.kept_share.tolist(), strict=True):
        assert 0 < share <= 1 and share == pytest.approx(float((sheet.indices == index).float().mean((0, 1)).sum()))
        assert number < 0 or DOCUMENTS[number].text[start:stop]


def test_a_killed_build_goes_on_from_its_checkpoint_to_the_same_bits(tiny, tmp_path):
    whole, checkpoint = build(tiny, chunk_tokens=40), tmp_path / "a.part"
    seen = []

    def killed(done, total):
        seen.append(done)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tiny, chunk_tokens=40, checkpoint=checkpoint, progress=killed)
    resumed = build(tiny, chunk_tokens=40, checkpoint=checkpoint, progress=lambda done, total: seen.append(done))
    assert seen[:6] == [0, 40, 80, 80, 120, 160]
    for first, second in zip(whole.layers, resumed.layers, strict=True):
        assert torch.equal(first.keys, second.keys) and torch.equal(first.values, second.values)


@pytest.mark.parametrize(
    "change", [{"rate": 2}, {"scorer": "finch"}, {"seed": 1}, {"chunk_tokens": 41}, {"system": "x"}]
)
def test_a_checkpoint_of_another_build_is_refused(tiny, tmp_path, change):
    checkpoint = tmp_path / "a.part"
    build(tiny, chunk_tokens=40, checkpoint=checkpoint)
    with pytest.raises(SheetError, match="belongs to another build"):
        build(tiny, **{"chunk_tokens": 40, "checkpoint": checkpoint, **change})


@pytest.mark.parametrize("keep", [0, 1, 8, 100, -1])
def test_a_damaged_checkpoint_is_refused(tiny, tmp_path, keep):
    checkpoint = tmp_path / "a.part"
    build(tiny, chunk_tokens=40, checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:keep])
    with pytest.raises(SheetError, match="is damaged"):
        build(tiny, chunk_tokens=40, checkpoint=checkpoint)


@pytest.mark.parametrize(("asked", "tokens"), [({}, 25), ({"rate": 5}, 20), ({"rate": 1}, 100), ({"budget": 7}, 7)])
def test_budgets_are_counted_in_tokens(asked, tokens):
    assert BuildOptions(**asked).tokens(100) == tokens


def test_metadata_of_any_kind_is_kept_as_far_as_json_can_hold_it(tiny):
    endless = {}
    endless["again"] = endless
    odd = {1: "one", (2, 3): {"a": (4, {5: Path("x")})}, "endless": endless}
    made = build(tiny, ZERO_SHOT, [Document("Ida Lund lives in Rome.", "ida", odd)], rate=1)
    kept = made.manifest.documents[0].metadata
    assert kept["1"] == "one" and kept["(2, 3)"] == {"a": [4, {"5": "x"}]} and "endless" in kept
    assert made.manifest.model_dump_json()


@pytest.mark.parametrize("options", [{"budget": 10.5}, {"budget": True}, {"rate": 2, "chunk_tokens": 40.0}])
def test_a_number_of_tokens_is_whole_or_refused_by_name(tiny, options):
    name = "budget" if "budget" in options else "chunk_tokens"
    with pytest.raises(BudgetError, match=f"{name} is {options[name]}; pass a whole number of tokens"):
        build_sheet(tiny, DOCUMENTS, ZERO_SHOT, **options)


@pytest.mark.parametrize("mode", ["sequential", "independent"])
def test_a_build_without_a_task_warns_once_and_names_the_way_out(tiny, caplog, mode):
    with caplog.at_level(logging.WARNING, "cribsheet"):
        CompressedKnowledgeLLM.build(DOCUMENTS, model=tiny, rate=1.5, mode=mode)
    (warning,) = caplog.messages
    assert warning.startswith("no task was given") and "with task=, best" in warning and "--task" not in warning


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("Where do people live?", {}),
        (Task(Task.of(None).description, (("Where does Bob live?", "Oslo"),)), {}),
        (None, {"scorer": "recent"}),  # which looks at no task
        (None, {"scorer": "reconstruction"}),
    ],
)
def test_nobody_is_warned_of_a_task_that_is_given_or_not_looked_at(tiny, caplog, task, options):
    with caplog.at_level(logging.WARNING, "cribsheet"):
        CompressedKnowledgeLLM.build(DOCUMENTS, task, model=tiny, rate=1.5, **options)
    assert caplog.messages == []


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.5, True, "7"])
@pytest.mark.parametrize("mode", ["sequential", "independent"])
def test_a_seed_that_no_sheet_can_hold_is_refused_before_any_work(tiny, mode, seed):
    with pytest.raises(BudgetError, match=r"seed is .*; pass a whole number from"):
        build(tiny, seed=seed, mode=mode, progress=lambda read, tokens: pytest.fail("it began to read"))
