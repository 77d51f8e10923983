"""Answers from a sheet can be judged: they have sources, and the judge is another model."""

from __future__ import annotations

import asyncio

import pytest
from index_corpus import ANSWER, QUESTION
from llama_index.core.evaluation import (
    BatchEvalRunner,
    CorrectnessEvaluator,
    FaithfulnessEvaluator,
    RelevancyEvaluator,
)
from llama_index.core.llms import ChatMessage

pytestmark = pytest.mark.filterwarnings("ignore:asyncio_module:DeprecationWarning")  # LlamaIndex's own helper

JUDGEMENT = "4.5\nThe answer is right."


def test_the_judge_gets_the_passage_that_the_answer_came_from(kb, engine, says):
    judge = says("YES")
    told: list[str] = []

    class Listening(type(judge)):
        async def achat(self, messages, **kwargs):
            told.extend(str(message.content) for message in messages)
            return await super().achat(messages, **kwargs)

    result = FaithfulnessEvaluator(llm=Listening(knowledge=judge.knowledge)).evaluate_response(
        QUESTION, engine.query(QUESTION)
    )
    assert result.passing and result.response == ANSWER
    assert any("Hugo Ali lives in Quito." in text and ANSWER in text for text in told)
    assert judge.knowledge.backbone is not kb.backbone


@pytest.mark.parametrize(("verdict", "passing"), [("YES", True), ("NO", False)])
def test_faithfulness_and_relevancy_follow_the_judge(engine, says, verdict, passing):
    response = engine.query(QUESTION)
    for evaluator in (FaithfulnessEvaluator(llm=says(verdict)), RelevancyEvaluator(llm=says(verdict))):
        result = evaluator.evaluate_response(query=QUESTION, response=response)
        assert result.passing is passing and result.contexts


def test_answers_without_sources_cannot_be_judged_faithful(kb, says):
    response = kb.as_query_engine(max_tokens=12, similarity_top_k=0).query(QUESTION)
    assert FaithfulnessEvaluator(llm=says("YES")).evaluate_response(response=response).passing is False


def test_correctness_is_a_score_with_a_reason(engine, says):
    result = CorrectnessEvaluator(llm=says(JUDGEMENT)).evaluate_response(
        query=QUESTION, response=engine.query(QUESTION), reference=ANSWER
    )
    assert (result.score, result.passing, result.feedback) == (4.5, True, "The answer is right.")


def test_a_batch_of_questions_is_answered_and_judged_at_once(engine, says):
    runner = BatchEvalRunner(
        {
            "faithfulness": FaithfulnessEvaluator(llm=says("YES")),
            "relevancy": RelevancyEvaluator(llm=says("NO")),
            "correctness": CorrectnessEvaluator(llm=says(JUDGEMENT)),
        },
        workers=4,
    )
    questions = [f"Where does {name} live?" for name in ("Hugo Ali", "Clara Berg", "Nina Sato", "Bob Smith")]
    results = asyncio.run(
        runner.aevaluate_queries(
            engine, queries=questions, correctness={"reference": ["Quito", "Cairo", "Kyoto", "Oslo"]}
        )
    )
    assert [result.response for result in results["correctness"]] == ["Quito", "Cairo", "Kyoto", "Oslo"]
    assert {name: [result.passing for result in each] for name, each in results.items()} == {
        "faithfulness": [True] * 4,
        "relevancy": [False] * 4,
        "correctness": [True] * 4,
    }


def test_a_sheets_own_model_may_judge_in_a_form(kb, llm):
    """A judge that may only say yes or no always gives a verdict, also a weak one."""

    class YesOrNo(type(llm)):
        async def achat(self, messages, **kwargs):
            return await super().achat(messages, **{**kwargs, "choices": ["YES", "NO"]})

    verdict = asyncio.run(YesOrNo(knowledge=kb).achat([ChatMessage(content="Is Quito a city? YES or NO?")]))
    assert verdict.message.content in ("YES", "NO")
