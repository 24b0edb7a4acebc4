"""Each Redis user of config/redis/users.acl.template does its job, and is refused the rest, on every server at hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chord, group
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError

from config.settings import Settings
from tasks import Client, Complete, EndUpdate, InvalidRequest, JobCanceled, TextUpdate, batch
from tasks.campaign.control import CampaignControl, CampaignInfo, CampaignProgress
from tasks.campaign.directory import Campaigns
from tasks.cli.queue import queue_state
from tasks.failed import FailedJobs
from tasks.outbox import Delivery, Outbox, delivery_id
from tasks.redis_keys import UPDATES
from tasks.review import ReviewBounds, ReviewList
from tests.support.guarded import USERS, as_user, binaries, make_secrets
from tests.support.outbox import delivery
from tests.support.stand import Producer, callbacks_worker
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack
from worker.models.fake import UNSURE
from worker.observability.queue import GAUGES, QueueCollector, exporter_app

HELLO = Complete(prompt=["Hello"], max_new_tokens=3)
SLOW = Complete(prompt=["Hello"], max_new_tokens=500)


class Guarded:
    """A server with our users, a worker beside it, and one more user that may look at what was refused."""

    def __init__(self, server: stack.Broker, secrets: Path, log: Path) -> None:
        self.server = server
        self.secrets = secrets
        self.log = log
        self.admin = self.admin_of(0)

    def __getitem__(self, user: str) -> stack.Broker:
        return as_user(self.server, self.secrets, user)

    def admin_of(self, database: int) -> Redis:
        return Redis(port=self.server.port, db=database, username="admin", password="x", decode_responses=True)

    def refusals(self, user: str) -> set[str]:
        """What the server has refused a user since it was last asked."""
        entries = [entry for entry in self.admin.acl_log() if entry["username"] == user]
        self.admin.acl_log_reset()
        # redis-py says its name at each connection and takes a no: Redis 7.0 knows no right to it.
        return {entry["object"] for entry in entries} - {"client|setinfo"}


@pytest.fixture(scope="module", params=binaries(), ids=lambda binary: Path(binary).name)
def guarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    secrets = make_secrets(folder / "secrets")
    acl = folder / "users.acl"
    acl.write_text((secrets / "redis" / "users.acl").read_text() + "user admin on nopass +@all ~* &*\n")
    with stack.broker("--aclfile", str(acl), binary=request.param) as server:
        stood = Guarded(server, secrets, folder / "log")
        settings = {"MODEL": "fake:0.01", "RETRY_BACKOFF_S": "0.1"}
        with stack.worker(stood["worker"], settings=settings, log=stood.log):
            yield stood
    assert "NoPermission" not in stood.log.read_text()


@pytest.fixture(autouse=True)
def _afresh(guarded: Guarded) -> None:
    guarded.admin.acl_log_reset()


def _refused(call: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(NoPermissionError):
        call(*arguments)


# --- The producer ---------------------------------------------------------------------------------


def test_a_producer_submits_with_every_option_of_our_client_and_reads_its_answers(guarded: Guarded) -> None:
    client = Client(guarded["producer"].url)
    jobs = [client.submit(HELLO, priority=priority) for priority in range(10)]
    assert {job.result(PATIENCE_S).text for job in jobs} == {"llo"}
    keyed = HELLO.model_copy(update={"idempotency_key": "one"})
    assert client.submit(keyed).id == client.submit(keyed).id
    assert client.submit(keyed).result(PATIENCE_S).text == "llo"
    assert len(client.workers()) == 1
    assert guarded.refusals("producer") == set()


def test_a_producer_watches_its_streamed_jobs_and_a_monitor_reads_their_updates(guarded: Guarded) -> None:
    client = Client(guarded["producer"].url)
    job = client.submit(SLOW.model_copy(update={"stream": True}))
    *updates, end = job.watch(PATIENCE_S)
    assert isinstance(end, EndUpdate)
    assert "".join(update.text for update in updates if isinstance(update, TextUpdate)) == end.result().text
    # It counts, since it may not read the queue.
    assert guarded.refusals("producer") <= {"eval"}
    name = UPDATES.named(job.id)
    assert guarded["monitor"].connect(1).xrange(name)
    for user in ("producer", "monitor"):
        _refused(guarded[user].connect(1).xadd, name, {"text": "x"})
    _refused(guarded["callbacks"].connect(1).xrange, name)


def test_a_producer_reads_no_id_from_a_key_whose_payload_it_does_not_know(guarded: Guarded) -> None:
    job = Complete(prompt=["a secret"], max_new_tokens=3, idempotency_key="order 17")
    id = Client(guarded["producer"].url).submit(job).id
    name = hashlib.sha256(json.dumps(["idefics", "order 17"]).encode()).hexdigest()
    shown = guarded["producer"].connect(1).get(f"idefics:key:{name}") or b""
    assert json.loads(shown)["is_sent"]
    assert id not in shown.decode()
    assert id.encode().hex() not in shown.decode()
    with pytest.raises(InvalidRequest, match="another payload"):
        Client(guarded["producer"].url).submit(Complete(prompt=["a guess"], idempotency_key="order 17"))
    assert Client(guarded["producer"].url).submit(job).id == id
    Client(guarded["producer"].url).result(id, PATIENCE_S)


def test_a_producer_has_lines_run_and_their_results_forgotten(guarded: Guarded) -> None:
    client = Client(guarded["producer"].url)
    arguments = HELLO.model_dump(mode="json", exclude_defaults=True)
    line = {"task": "complete", "arguments": arguments}
    kept = set(guarded.admin_of(1).keys("celery-task-meta-*"))
    answers = list(batch.run(client, (json.dumps({"custom_id": str(number), **line}) for number in range(20))))
    assert {answer["result"]["text"] for answer in answers} == {"llo"}
    assert set(guarded.admin_of(1).keys("celery-task-meta-*")) == kept
    assert guarded.refusals("producer") == set()


def test_a_producer_cancels_by_the_key_alone(guarded: Guarded) -> None:
    job = Client(guarded["producer"].url).submit(SLOW)
    eventually(lambda: job.status == "processing")
    job.cancel()
    with pytest.raises(JobCanceled):
        job.result(PATIENCE_S)
    # What our client tries beside it.
    assert guarded.refusals("producer") == {"/0.celery.pidbox"}


@pytest.mark.parametrize(
    ("user", "knows_held", "knows_workers"),
    [("producer", False, True), ("worker", True, True), ("monitor", True, True), ("exporter", True, True)],
)
def test_the_queue_command_shows_what_a_user_may_know(
    guarded: Guarded, user: str, knows_held: bool, knows_workers: bool
) -> None:
    state = queue_state(Client(guarded[user].url))
    assert set(state.by_priority) == set(range(10))
    assert (state.due_later is not None, state.in_flight is not None) == (knows_held, knows_held)
    assert (state.workers is not None) == knows_workers


def test_a_producer_reports_on_its_campaign_and_steers_those_of_all_producers(guarded: Guarded) -> None:
    client = Client(guarded["producer"].url)
    control = CampaignControl(client.app, "own id")
    control.register(CampaignInfo("shoes", HELLO.task, "shoes.csv", "out.csv", "here"))
    known = Campaigns(Client(guarded["producer"].url).app)
    known.want(known.get("shoes").id, "canceled")
    with pytest.raises(JobCanceled):
        client.submit(HELLO, headers=control.headers).result(PATIENCE_S)
    assert control.state() == "canceled"
    known.want(control.id, "running")
    control.report(CampaignProgress(rows=10, done=5))
    control.end("finished", CampaignProgress(rows=10, done=10))
    for user in ("producer", "worker", "monitor"):
        (seen,) = Campaigns(Client(guarded[user].url).app).all()
        assert (seen.info.name, seen.progress.done, seen.status) == ("shoes", 10, "finished")
    assert control.trouble == ""
    assert [guarded.refusals(user) for user in ("producer", "worker", "monitor")] == [set(), set(), set()]
    guarded.admin.delete(*guarded.admin.keys("idefics:campaign:*"))


def test_a_producer_with_a_plain_celery_app_sends_groups_chords_chains_and_countdowns(guarded: Guarded) -> None:
    producer = Producer(guarded["producer"])
    job = producer.complete(immutable=True)
    assert job.apply_async(countdown=1).get(timeout=PATIENCE_S)["text"] == "llo"
    answers = group(job, job).apply_async().get(timeout=PATIENCE_S)
    assert [answer["text"] for answer in answers] == ["llo", "llo"]
    assert chord([job, job])(job).get(timeout=PATIENCE_S)["text"] == "llo"
    assert (job | job).apply_async().get(timeout=PATIENCE_S)["text"] == "llo"
    assert guarded.refusals("producer") == set()


def test_a_producer_cannot_reach_the_workers_mailbox(guarded: Guarded) -> None:
    app = Celery(broker=guarded["producer"].url, backend=guarded["producer"].results)
    for order in (app.control.shutdown, app.control.purge, lambda: app.control.revoke("id", terminate=True)):
        with pytest.raises(Exception, match=r"permission|permitted"):
            order()
    assert Client(guarded["producer"].url).submit(HELLO).result(PATIENCE_S).text == "llo"


@pytest.mark.parametrize("database", [0, 1])
def test_a_producer_cannot_list_or_read_what_is_not_its_own(guarded: Guarded, database: int) -> None:
    redis = guarded["producer"].connect(database)
    for look in (redis.keys, redis.scan, redis.randomkey, redis.dbsize, redis.client_list, redis.acl_list):
        _refused(look)
    for queue in ("idefics", "idefics\x06\x163", "idefics.callbacks", "shop"):
        _refused(redis.lrange, queue, 0, -1)
        _refused(redis.rpop, queue)
        _refused(redis.delete, queue)
    _refused(redis.lpush, "shop", "x")
    _refused(redis.lpush, "idefics.callbacks", "x")
    _refused(redis.hgetall, "unacked")
    _refused(redis.get, "idefics:answer:x")
    _refused(redis.hgetall, "idefics:failed:signatures")
    _refused(redis.hgetall, "idefics:review:items")
    _refused(redis.hgetall, "idefics:callbacks:delivery:x")


def test_a_producer_cannot_forge_or_follow_others_answers(guarded: Guarded) -> None:
    redis = guarded["producer"].connect(1)
    _refused(redis.set, "celery-task-meta-x", "{}")
    _refused(redis.publish, "celery-task-meta-x", "{}")
    _refused(redis.get, "idefics:cancel:x")
    for pattern in ("celery-task-meta-*", "*"):
        _refused(redis.execute_command, "PSUBSCRIBE", pattern)


@pytest.mark.parametrize("user", USERS)
def test_no_user_administers_the_server(guarded: Guarded, user: str) -> None:
    redis = guarded[user].connect()
    for command in ("FLUSHALL", "CONFIG GET dir", "SHUTDOWN", "ACL LIST", "KEYS *", "SCAN 0", "SAVE"):
        _refused(redis.execute_command, *command.split())
    _refused(redis.replicaof, "127.0.0.1", 1)


def test_an_unknown_user_is_refused(guarded: Guarded) -> None:
    for server in (guarded.server, stack.Redis(guarded.server.port, "producer:wrong@")):
        with pytest.raises(AuthenticationError):
            server.connect().ping()


# --- The worker -----------------------------------------------------------------------------------


def test_two_workers_know_each_other(guarded: Guarded, tmp_path: Path) -> None:
    log = tmp_path / "log"
    arguments = ("--hostname", "second@%h", "--loglevel", "INFO")
    with stack.worker(guarded["worker"], *arguments, settings={"MODEL": "fake"}, log=log) as second:
        stack.await_line(second, log, "sync complete", PATIENCE_S)
        answers = Celery(broker=guarded["worker"].url).control.inspect(timeout=2).ping()
        assert len(answers) == 2
    assert "NoPermission" not in log.read_text()
    assert guarded.refusals("worker") == set()


@pytest.mark.parametrize("priority", [0, 5, 9])
def test_a_worker_sends_links_to_the_default_queue_of_celery(guarded: Guarded, priority: int) -> None:
    producer = Producer(guarded["producer"])
    link = producer.app.signature("site.save", priority=priority)
    job = producer.complete(tokens=-1, link=link, link_error=link).apply_async()
    operator = FailedJobs(Client(guarded["worker"].url).app)
    lists = ["celery", "celery\x06\x163", "celery\x06\x166", "celery\x06\x169"]
    eventually(lambda: any(guarded.admin.llen(name) for name in lists))
    (list_,) = [name for name in lists if guarded.admin.llen(name)]
    assert json.loads(guarded.admin.lpop(list_))["headers"]["parent_id"] == job.id
    eventually(lambda: job.id in [kept.id for kept in operator])
    operator.drop(operator.get(job.id))
    assert guarded.refusals("worker") == set()


def test_a_worker_retries_and_keeps_failures_which_its_operator_sends_again(guarded: Guarded) -> None:
    producer = Producer(guarded["producer"])
    job = producer.show("http://127.0.0.1:9/x").apply_async()
    with pytest.raises(Exception, match="not allowed"):
        job.get(timeout=PATIENCE_S)
    operator = Client(guarded["worker"].url)
    eventually(lambda: [kept.id for kept in operator.failed()] == [job.id])
    operator.retry(job.id)
    eventually(lambda: [kept.id for kept in operator.failed()] == [job.id])
    jobs = FailedJobs(operator.app)
    assert jobs.drop(jobs.get(job.id))
    assert guarded.refusals("worker") == set()


def test_a_worker_keeps_doubtful_answers_which_its_operator_decides(guarded: Guarded) -> None:
    asked = Complete(prompt=[f"{UNSURE} Hello"], max_new_tokens=3, min_confidence=0.9, metadata={"row": 7})
    assert Client(guarded["producer"].url).submit(asked).result(timeout=PATIENCE_S).abstained
    reviews = ReviewList(Client(guarded["worker"].url).app)
    (item,) = reviews.waiting()
    reviews.put(item, [b"jpeg"], ReviewBounds(10, 10_000, 60), callback=("https://shop.test/hook", "main"))
    assert reviews.picture(item.id, 0) == b"jpeg"
    assert reviews.decide(item.id, "Goodbye")
    assert reviews.undo(item.id)
    assert reviews.decide(item.id, None)
    assert [decision.answer for _, decision in reviews.decisions()] == [None]
    guarded.admin.delete(*guarded.admin.keys("idefics:callbacks:*"))
    assert guarded.refusals("worker") == set()


# --- The monitor ----------------------------------------------------------------------------------


def test_a_monitor_sees_events_and_lengths_and_no_payload(guarded: Guarded) -> None:
    seen: list[dict[str, Any]] = []
    ids: list[str] = []
    producer = Producer(guarded["producer"])
    app = Celery(broker=guarded["monitor"].url)
    app.conf.broker_transport_options = {"ack_emulation": False}
    with app.connection() as connection:
        receiver = app.events.Receiver(connection)

        def see(event: dict[str, Any]) -> None:
            seen.append(event)
            if not ids:
                # A heartbeat: from now on it hears everything.
                ids.append(str(producer.complete("Hello").apply_async()))
            receiver.should_stop = event["type"] == "task-succeeded" and event["uuid"] in ids

        receiver.handlers["*"] = see
        receiver.capture(limit=None, timeout=PATIENCE_S, wakeup=False)
    assert {"task-received", "task-succeeded"} <= {event["type"] for event in seen}
    assert "Hello" not in repr(seen)
    redis = guarded["monitor"].connect()
    assert redis.llen("idefics") == 0
    assert redis.llen("idefics\x06\x165") == 0
    assert redis.hlen("unacked") == 0
    assert redis.info("memory")["used_memory"] > 0
    assert guarded.refusals("monitor") == set()


def test_a_monitor_cannot_submit_read_or_order(guarded: Guarded) -> None:
    redis = guarded["monitor"].connect()
    for queue in ("idefics", "idefics\x06\x165"):
        _refused(redis.lpush, queue, "x")
        _refused(redis.lrange, queue, 0, -1)
        _refused(redis.delete, queue)
    for key in ("celery-task-meta-x", "idefics:key:x", "idefics:cancel:x"):
        _refused(redis.get, key)
        _refused(redis.set, key, "x")
    _refused(redis.hgetall, "unacked")
    _refused(Campaigns(Client(guarded["monitor"].url).app).want, "x", "paused")
    _refused(redis.hget, "idefics:failed:signatures", "x")
    _refused(redis.publish, "/0.celery.pidbox", "x")
    _refused(redis.publish, "/0.celeryev/task.succeeded", "x")
    _refused(redis.eval, "return redis.call('LINDEX', KEYS[1], -1)", 1, "idefics")


# --- The queue exporter ---------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["exporter", "monitor"])
def test_the_queue_exporter_needs_no_other_rights(guarded: Guarded, user: str) -> None:
    app = exporter_app(Settings(broker_url=guarded[user].url))
    outbox = Outbox(guarded["worker"].connect())
    for number in (1, 2):
        outbox.add(delivery(number))
    try:
        names = {metric.name for metric in QueueCollector(app, "idefics").collect()}
    finally:
        guarded.admin.delete(*guarded.admin.keys("idefics:callbacks:*"))
    assert names == set(GAUGES)
    assert guarded.refusals(user) == set()


def test_an_exporter_looks_at_waiting_jobs_and_changes_and_orders_nothing(guarded: Guarded) -> None:
    redis = guarded["exporter"].connect()
    assert redis.eval("return redis.call('LINDEX', KEYS[1], -1)", 1, "idefics") is None
    for queue in ("idefics", "idefics\x06\x165"):
        _refused(redis.lpush, queue, "x")
        _refused(redis.rpop, queue)
        _refused(redis.delete, queue)
        with pytest.raises(ResponseError, match=r"(?i)permission.*rpop"):
            redis.eval("return redis.call('RPOP', KEYS[1])", 1, queue)
    for key in ("celery-task-meta-x", "idefics:key:x", "idefics:cancel:x", "idefics:worker:options"):
        _refused(redis.get, key)
        _refused(redis.set, key, "x")
    _refused(redis.hgetall, "unacked")
    _refused(redis.hgetall, "idefics:callbacks:delivery:x")
    _refused(redis.zrange, "idefics:failed", 0, -1)
    _refused(redis.publish, "/0.celery.pidbox", "x")
    _refused(redis.execute_command, "SUBSCRIBE", "celery-task-meta-x")


# --- Callbacks ------------------------------------------------------------------------------------


def test_the_callbacks_worker_attempts_what_a_worker_left_it_and_answers_a_ping(
    guarded: Guarded, tmp_path: Path
) -> None:
    url = "https://127.0.0.1/hook"
    delivery = Delivery(delivery_id("job", "job.succeeded"), "job", "job.succeeded", url, "key", "{}")
    outbox = Outbox(guarded["worker"].connect())
    assert outbox.add(delivery)
    with callbacks_worker(guarded["callbacks"], tmp_path / "log", {}):
        eventually(lambda: outbox.read([delivery.id])[0].attempts == 1)
        app = Celery(broker=guarded["callbacks"].url)
        app.conf.broker_transport_options = {"ack_emulation": False}
        app.conf.control_exchange = "idefics.callbacks"
        # Importing worker.app has given this process the workers' own, which needs other rights.
        app.conf.broker_transport = "kombu.transport.redis:Transport"
        assert len(app.control.inspect(timeout=1).ping()) == 1
        assert guarded.refusals("callbacks") == set()
    assert "permission" not in (tmp_path / "log").read_text().lower()


def test_callbacks_have_their_outbox_and_see_no_job(guarded: Guarded) -> None:
    redis = guarded["callbacks"].connect()
    redis.zadd("idefics:callbacks:x", {"a": 1})
    assert redis.eval("return redis.call('ZRANGE', KEYS[1], 0, -1)", 1, "idefics:callbacks:x") == [b"a"]
    assert redis.delete("idefics:callbacks:x") == 1
    for database in (0, 1):
        redis = guarded["callbacks"].connect(database)
        _refused(redis.lpush, "idefics", "x")
        _refused(redis.rpop, "idefics")
        _refused(redis.get, "celery-task-meta-x")
        _refused(redis.hgetall, "unacked")
        _refused(redis.hgetall, "idefics:failed:signatures")
        _refused(redis.set, "idefics:cancel:x", 1)
        _refused(redis.publish, "/0.celery.pidbox", "x")
        _refused(redis.eval, "return redis.call('RPOP', KEYS[1])", 1, "idefics")


# --- Several models -------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", binaries(), ids=lambda binary: Path(binary).name)
def test_a_named_model_is_reached_with_its_rights_and_no_other_queue(tmp_path: Path, binary: str) -> None:
    secrets = make_secrets(tmp_path / "secrets", models="fast")
    acl = tmp_path / "users.acl"
    acl.write_text((secrets / "redis" / "users.acl").read_text() + "user admin on nopass +@all ~* &*\n")
    settings = {"MODEL": "fake", "QUEUE": "idefics.fast", "RETRY_BACKOFF_S": "0.1"}
    with stack.broker("--aclfile", str(acl), binary=binary) as server:
        guarded = Guarded(server, secrets, tmp_path / "log")
        with stack.worker(guarded["worker"], settings=settings, log=guarded.log):
            client = Client(guarded["producer"].url)
            eventually(lambda: [model.name for model in client.models()] == ["fast"])
            jobs = [client.submit(HELLO, model="fast", priority=priority) for priority in range(10)]
            assert {job.result(PATIENCE_S).text for job in jobs} == {"llo"}
            keyed = HELLO.model_copy(update={"idempotency_key": "one"})
            assert client.submit(keyed, model="fast").id == client.submit(keyed, model="fast").id
            assert len(client.workers(model="fast")) == 1
            failing = client.submit(Complete(prompt=["Hello"], max_new_tokens=5_000), model="fast")
            with pytest.raises(InvalidRequest):
                failing.result(PATIENCE_S)
            eventually(lambda: [kept.id for kept in Client(guarded["worker"].url).failed()] == [failing.id])
            assert queue_state(Client(guarded["monitor"].url, queue="idefics.fast")).waiting == 0
            assert [guarded.refusals(user) for user in ("producer", "worker")] == [set(), set()]
            _refused(guarded["producer"].connect().lpush, "idefics.other", "x")
        assert "NoPermission" not in guarded.log.read_text()
