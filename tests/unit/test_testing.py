"""The fake client that producers test with."""

from __future__ import annotations

import asyncio
import inspect

import pytest

from tasks import (
    Caption,
    Classify,
    Client,
    EndUpdate,
    ImageBlocked,
    Job,
    JobCanceled,
    JobTimeout,
    ModelNotFound,
    Result,
    StageUpdate,
    SubmittedJob,
    TextUpdate,
    Update,
)
from tasks.testing import FakeClient, FakeJob, canned

URL = "https://example.com/a.jpg"
ONE, TWO = Caption(image=URL, prompt="one"), Caption(image=URL, prompt="two", metadata={"row": 2})


def _prompt(job: Job) -> str:
    assert isinstance(job, Caption)
    return job.prompt or ""


def _blocked(job: Job) -> str:
    raise ImageBlocked("Use another.")


def _methods(thing: type) -> set[str]:
    return {name for name in vars(thing) if not name.startswith("_")}


def test_every_job_has_an_answer_at_once() -> None:
    job = FakeClient().submit(ONE, priority=1)
    assert job.status == "succeeded"
    assert job.result(timeout=1).text == "an answer"


def test_the_answer_may_depend_on_the_job() -> None:
    jobs = FakeClient(_prompt).submit_many(iter([ONE, TWO]), priority=1)
    assert [job.result().text for job in jobs] == ["one", "two"]
    assert jobs[1].result().metadata == {"row": 2}


def test_the_answer_may_be_a_whole_result() -> None:
    expected = canned("cut", ONE).model_copy(update={"finish_reason": "length"})
    assert FakeClient(lambda job: expected).submit(ONE).result() == expected


def test_an_error_that_the_answer_raises_fails_the_job_and_not_its_submission() -> None:
    job = FakeClient(_blocked).submit(ONE)
    assert job.status == "failed"
    with pytest.raises(ImageBlocked, match=r"Use another\."):
        job.result()


def test_a_cancellation_that_the_answer_raises_cancels_the_job() -> None:
    def cancel(job: Job) -> str:
        raise JobCanceled

    job = FakeClient(cancel).submit(ONE)
    assert job.status == "canceled"
    with pytest.raises(JobCanceled):
        job.result()


@pytest.mark.parametrize(("said", "label"), [("dog", "dog"), ("an answer", "cat")])
def test_a_classification_has_a_label_and_scores(said: str, label: str) -> None:
    result = FakeClient(lambda job: said).submit(Classify(image=URL, labels=["cat", "dog"])).result()
    assert (result.text, result.label) == (label, label)
    assert result.scores == {"cat": float(label == "cat"), "dog": float(label == "dog")}


def test_asyncio_keeps_the_options() -> None:
    assert asyncio.run(FakeClient().asubmit(ONE, task_id="row-7")).id == "row-7"


def test_a_defect_of_the_test_itself_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        FakeClient(lambda job: str(1 // 0)).submit(ONE)


def test_submitted_jobs_are_kept_in_order() -> None:
    client = FakeClient()
    client.submit(ONE)
    client.submit_many([TWO, ONE])
    assert client.submitted == [ONE, TWO, ONE]


def test_a_job_is_found_again_by_its_id() -> None:
    client = FakeClient(_prompt)
    one, two = client.submit_many([ONE, TWO])
    assert one.id != two.id
    assert client.job(two.id) is two
    assert client.result(one.id, timeout=1).text == "one"


def test_an_unknown_or_forgotten_job_waits_as_with_the_real_client() -> None:
    client = FakeClient()
    job = client.submit(ONE)
    client.forget([job.id])
    for id in (job.id, "unknown"):
        assert client.status(id) == "starting"
        assert client.outcomes([id]) == {}
        client.cancel(id)
        with pytest.raises(JobTimeout, match=id):
            client.result(id, timeout=1)


def test_a_failed_job_is_listed_and_can_be_tried_again() -> None:
    answers = iter([_blocked, _prompt])
    client = FakeClient(lambda job: next(answers)(job))
    job = client.submit(ONE)
    assert [(failed.id, failed.code, failed.task) for failed in client.failed()] == [
        (job.id, "image_blocked", "idefics.caption")
    ]
    assert client.retry(job.id).id == job.id
    assert client.result(job.id).text == "one"
    assert list(client.failed()) == []
    with pytest.raises(LookupError):
        client.retry(job.id)


def test_asyncio_has_the_same_answers() -> None:
    async def story() -> Result:
        client = FakeClient(_prompt)
        job = await client.asubmit(ONE, priority=1)
        assert (await job.aresult(timeout=1)).text == "one"
        return await client.aresult(job.id, timeout=1)

    assert asyncio.run(story()).text == "one"


def test_a_failed_job_raises_in_asyncio_too() -> None:
    async def story() -> None:
        job = await FakeClient(_blocked).asubmit(ONE)
        await job.aresult()

    with pytest.raises(ImageBlocked):
        asyncio.run(story())


def test_the_fake_client_has_every_method_of_the_real_one() -> None:
    assert _methods(Client) - _methods(FakeClient) == set()


def test_the_fake_job_has_every_method_of_the_real_one() -> None:
    assert _methods(SubmittedJob) - _methods(FakeJob) == set()


@pytest.mark.parametrize(("real", "fake"), [(Client, FakeClient), (SubmittedJob, FakeJob)])
def test_a_fake_method_waits_where_the_real_one_does(real: type, fake: type) -> None:
    for name in _methods(real) & _methods(fake):
        assert inspect.iscoroutinefunction(getattr(real, name)) == inspect.iscoroutinefunction(getattr(fake, name)), (
            name
        )


def test_a_job_may_name_a_model_of_the_fake_client() -> None:
    client = FakeClient(models=["large"])
    assert client.submit(ONE, model="large").result().model.id == "large"
    assert asyncio.run(client.asubmit(ONE, model="fake")).result().model.id == "fake"
    assert [job.result().model.id for job in client.submit_many([ONE, TWO], model="large")] == ["large", "large"]
    assert [(model.name, model.id, model.queue) for model in client.models()] == [
        (None, "fake", "idefics"),
        ("large", "large", "idefics.large"),
    ]


def test_a_model_that_the_fake_client_has_not_is_refused_with_those_that_it_has() -> None:
    client = FakeClient(models=["large"])
    with pytest.raises(ModelNotFound, match=r"Served now: fake, large\."):
        client.submit(ONE, model="small")
    assert client.submitted == []


def test_an_idempotency_key_of_the_fake_client_belongs_to_a_model() -> None:
    client, keyed = FakeClient(models=["large"]), ONE.model_copy(update={"idempotency_key": "row 7"})
    first = client.submit(keyed)
    assert client.submit(keyed).id == client.submit(keyed, model="fake").id == first.id
    assert client.submit(keyed, model="large").id == client.submit(keyed, model="large").id != first.id


def test_a_failed_job_is_tried_again_with_its_model() -> None:
    answers = iter([_blocked, _prompt])
    client = FakeClient(lambda job: next(answers)(job), models=["large"])
    job = client.submit(ONE, model="large")
    assert client.retry(job.id).result().model.id == "large"


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_job_is_watched_to_its_end(is_streamed: bool) -> None:
    client = FakeClient(lambda job: " two  words\n")
    job = client.submit(ONE.model_copy(update={"stream": is_streamed}))
    stage, *texts, end = client.job(job.id).watch()
    assert stage == StageUpdate("running")
    assert texts == ([TextUpdate(" two"), TextUpdate(" "), TextUpdate(" words\n")] if is_streamed else [])
    assert isinstance(end, EndUpdate)
    assert end.result() == job.result()

    async def watched() -> list[Update]:
        return [update async for update in job.awatch()]

    assert asyncio.run(watched()) == [stage, *texts, end]


def test_an_unknown_job_is_watched_until_the_timeout() -> None:
    with pytest.raises(JobTimeout):
        list(FakeClient().job("nobody").watch(timeout=1))
