"""Every step reaches MLflow once, whatever dies on the way, and training never waits for it."""

import http.client
import http.server
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from step_logs import DATA, log_of, points, record, result_of, write_outcome

from services.track import courier as courier_module
from services.track.courier import Courier
from services.track.runs import MlflowException, Tracker

TRIAL = "abc123"
LOG = f"trials/{TRIAL}/steps.jsonl"
SPEED = "train/tokens_per_second"


@pytest.fixture
def run_id(tracker):
    return tracker.open_trial(TRIAL, "gla", {"decay": "gla"}, DATA)


def new_courier(tracker, storage, run_id, steps=20, say=lambda line: None, trial=TRIAL):
    """The courier of a driver that has just started."""
    courier = Courier(tracker, storage, 1_000, say)
    courier.add(trial, "gla", run_id, steps)
    return courier


def rewrite(storage, data):
    """What a resumed worker does with its log: put the checkpoint's lines in place of it."""
    storage.write(LOG, data)


def append(storage, data):
    """What a worker does at a flush."""
    path = storage.local_path / LOG
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as stream:
        stream.write(data)


def steps_of(tracker, run_id, key="train/loss"):
    return [step for step, _ in points(tracker, run_id, key)]


def test_a_growing_log_arrives_as_it_grows(tracker, storage, run_id):
    courier = new_courier(tracker, storage, run_id)
    courier.poll()
    assert steps_of(tracker, run_id) == [] and tracker.status(run_id) == "SCHEDULED"
    for start, stop in ((1, 4), (5, 9), (10, 9), (10, 20)):
        append(storage, log_of(range(start, stop + 1)))
        courier.poll()
        assert steps_of(tracker, run_id) == list(range(1, stop + 1))
    assert tracker.status(run_id) == "RUNNING"
    assert points(tracker, run_id, "train/loss") == [(n, 5 - n / 128) for n in range(1, 21)]


def test_a_line_still_being_written_waits_for_its_end(tracker, storage, run_id):
    courier = new_courier(tracker, storage, run_id)
    whole = log_of(range(1, 4))
    for cut in (10, 70, 71, 100, len(whole) - 1):
        rewrite(storage, b"")
        append(storage, whole[:cut])
        courier.poll()
    assert steps_of(tracker, run_id) == [1, 2]
    append(storage, whole[-1:])
    courier.poll()
    assert points(tracker, run_id, SPEED) == [(1, 1000), (2, 1000), (3, 1000)]


def test_a_courier_that_starts_again_sends_nothing_twice(tracker, open_tracker, storage, run_id):
    append(storage, log_of(range(1, 11)))
    new_courier(tracker, storage, run_id).poll()
    append(storage, log_of(range(11, 16)))
    again = open_tracker()
    courier = new_courier(again, storage, run_id)
    courier.poll()
    courier.poll()
    assert steps_of(again, run_id) == list(range(1, 16)) == steps_of(again, run_id, SPEED)


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("seen", [4, 8, 10])
@pytest.mark.parametrize("grown", [5, 8, 10, 14, 20])
def test_a_log_cut_back_to_a_checkpoint_and_grown_again_gives_one_point_a_step(
    tracker, storage, run_id, restarted, seen, grown
):
    courier = new_courier(tracker, storage, run_id)
    append(storage, log_of(range(1, seen + 1)))
    courier.poll()
    rewrite(storage, log_of(range(1, 5)))  # the checkpoint after step 4
    append(storage, log_of(range(5, grown + 1), speed=98.765))  # the same losses at another, differently long, speed
    if restarted:
        courier = new_courier(tracker, storage, run_id)
    courier.poll()
    expected = [(n, 1000.0 if n <= seen else 98.765) for n in range(1, max(seen, grown) + 1)]
    assert points(tracker, run_id, SPEED) == expected
    assert points(tracker, run_id, "train/loss") == [(n, 5 - n / 128) for n, _ in expected]


def test_a_log_cut_back_while_a_line_was_half_read_mixes_no_two_lines(tracker, storage, run_id):
    courier = new_courier(tracker, storage, run_id)
    slow, fast = log_of(range(1, 8), speed=1.5), log_of(range(1, 8), speed=8.5)
    for cut in range(len(log_of(range(1, 6))) + 1, len(slow)):  # within lines 6 and 7
        rewrite(storage, slow[:cut])
        courier.poll()
        rewrite(storage, fast)
        delivery = courier._deliveries[TRIAL]
        courier.poll()
        assert delivery.last == record(7, 8.5)
    assert {value for _, value in points(tracker, run_id, SPEED)} <= {1.5, 8.5}
    assert steps_of(tracker, run_id, SPEED) == list(range(1, 8))


def test_a_damaged_line_holds_its_trial_back_and_is_named(tracker, storage, run_id, caplog):
    lines = log_of(range(1, 11)).splitlines(keepends=True)
    for damaged in (b"@@@\n", b"3\n", b'{"step": "x"}\n', b"", lines[7]):
        rewrite(storage, b"".join(lines[:4]) + damaged + b"".join(lines[5:]))
        courier = new_courier(tracker, storage, run_id, steps=10)
        courier.poll()
        courier.poll()
        assert steps_of(tracker, run_id) == [1, 2, 3, 4]
        assert not courier.deliver_result(TRIAL, result_of(TRIAL, 10), 1e9)
    assert f"{storage.root}/{LOG} ends at step 4 of 10; restore it" in caplog.text
    assert tracker.status(run_id) == "RUNNING"


def test_a_result_arrives_with_its_files_and_figures_and_ends_the_run(tracker, storage, run_id):
    courier = new_courier(tracker, storage, run_id, steps=10)
    append(storage, log_of(range(1, 11)))
    result = result_of(TRIAL, 10)
    write_outcome(storage, TRIAL, result)
    for _ in range(2):  # a driver that died before it noted the delivery delivers again
        assert courier.deliver_result(TRIAL, result, 1e9)
    run = tracker._client.get_run(run_id)
    assert run.info.status == "FINISHED" and steps_of(tracker, run_id) == list(range(1, 11))
    results = {key: value for key, value in run.data.tags.items() if key.startswith("result.")}
    assert results["result.held_out_loss"] == "2.5" and results["result.median_layer_02"] == "0.9"
    files = {f.path for f in tracker._client.list_artifacts(run_id)}
    assert files == {"model", "result.json", "histogram.png", "checkpoints"}
    assert {f.path for f in tracker._client.list_artifacts(run_id, "model")} == {"model/config.json", "model/model.safetensors"}
    assert [f.path for f in tracker._client.list_artifacts(run_id, "checkpoints")] == ["checkpoints/step_00000010"]


def test_weights_above_the_limit_are_named_by_their_place(tracker, storage, run_id, tmp_path):
    courier = new_courier(tracker, storage, run_id, steps=1)
    append(storage, log_of(range(1, 2)))
    write_outcome(storage, TRIAL, result_of(TRIAL, 1), weights=bytes(1001))
    assert courier.deliver_result(TRIAL, result_of(TRIAL, 1), 1000)
    assert [f.path for f in tracker._client.list_artifacts(run_id, "model")] == ["model/location.json"]
    said = next((tmp_path / "artifacts").rglob("location.json")).read_text()
    assert f"{storage.root}/trials/{TRIAL}/model/model.safetensors" in said


def test_a_run_that_is_finished_stays_finished_when_the_study_goes_on(tracker, open_tracker, storage, run_id):
    append(storage, log_of(range(1, 11)))
    write_outcome(storage, TRIAL, result_of(TRIAL, 10))
    assert new_courier(tracker, storage, run_id, steps=10).deliver_result(TRIAL, result_of(TRIAL, 10), 1e9)
    courier = new_courier(open_tracker(), storage, run_id, steps=10)  # as a driver does when the study grew
    courier.poll()
    assert tracker.status(run_id) == "FINISHED"


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_a_trial_that_did_not_finish_is_ended_and_runs_again_when_it_goes_on(tracker, storage, run_id, status):
    courier = new_courier(tracker, storage, run_id)
    append(storage, log_of(range(1, 5)))
    courier.poll()
    courier.mark_ended(TRIAL, status)
    assert tracker.status(run_id) == status
    append(storage, log_of(range(5, 7)))
    new_courier(tracker, storage, run_id).poll()
    assert tracker.status(run_id) == "RUNNING" and steps_of(tracker, run_id) == list(range(1, 7))


def test_a_run_that_somebody_deleted_holds_up_no_other(tracker, storage, run_id, caplog):
    other = tracker.open_trial("other", "other", {}, DATA)
    courier = new_courier(tracker, storage, run_id)
    courier.add("other", "other", other, 3)
    append(storage, log_of(range(1, 4)))
    storage.write("trials/other/steps.jsonl", log_of(range(1, 4)))
    write_outcome(storage, "other", result_of("other", 3))
    tracker._client.delete_run(run_id)
    courier.poll()
    assert steps_of(tracker, other) == [1, 2, 3]
    assert "MLflow did not take steps of gla (" in caplog.text
    assert courier.deliver_result("other", result_of("other", 3), 1e9)
    assert tracker.status(other) == "FINISHED"


def test_a_failure_between_two_calls_is_sent_again_and_stored_once(tracker, storage, run_id, monkeypatch):
    monkeypatch.setattr(courier_module, "RETRY_S", 0.0)
    monkeypatch.setattr(courier_module, "SEND_AT_ONCE", 4)
    log_batch, failures = tracker._client.log_batch, [False, True, False, True, True]

    def answer_lost(*args, **kwargs):
        log_batch(*args, **kwargs)  # stored, but the caller does not hear of it
        if failures and failures.pop():
            raise MlflowException("connection reset")

    monkeypatch.setattr(tracker._client, "log_batch", answer_lost)
    courier = new_courier(tracker, storage, run_id)
    append(storage, log_of(range(1, 21)))
    for _ in range(5):
        courier.poll()
    assert not failures
    assert steps_of(tracker, run_id) == list(range(1, 21)) == steps_of(tracker, run_id, SPEED)


def test_progress_is_said_in_one_line_that_ends_with_the_held_out_loss(tracker, storage, run_id):
    said = []
    courier = new_courier(tracker, storage, run_id, steps=3, say=said.append)
    courier.poll()
    assert said == []
    append(storage, log_of(range(1, 3)) + b'{"step": 3, "train/loss": 4.5, "held_out/loss": 4.25}\n')
    courier.poll()
    courier.poll()
    assert len(said) == 1 and "step      3/3  loss 4.5000" in said[0] and said[0].endswith("held-out 4.2500")


def test_a_log_that_vanished_does_not_stop_the_courier(tracker, storage, run_id):
    courier = new_courier(tracker, storage, run_id)
    append(storage, log_of(range(1, 4)))
    courier.poll()
    storage.delete(LOG)
    courier.poll()
    append(storage, log_of(range(1, 6)))
    courier.poll()
    assert steps_of(tracker, run_id) == [1, 2, 3, 4, 5]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A real `mlflow server` over SQLite, to be killed and started again at the same place."""

    def __init__(self, folder, env):
        folder.mkdir()
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.env = {**env, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = None

    def start(self):
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--artifacts-destination", f"{self.folder}/files",
        ]  # fmt: skip
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(command, env=self.env, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + 150
        while time.monotonic() < end:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
                time.sleep(0.3)
        raise AssertionError((self.folder / "log").read_text()[-2000:])

    def kill(self):
        """The server and its worker, at once."""
        if self.process is not None:
            os.killpg(self.process.pid, 9)
            self.process.wait(timeout=30)
            self.process = None


@pytest.mark.slow
def test_a_server_that_goes_away_delays_the_steps_and_loses_none(tmp_path, storage, process_env, monkeypatch, caplog):
    monkeypatch.setattr(courier_module, "RETRY_S", 0.0)
    server = Server(tmp_path / "server", process_env)
    try:
        server.start()
        tracker = Tracker(server.uri, None)
        tracker.open_study("remote", "which?")
        run_id = tracker.open_trial(TRIAL, "gla", {"decay": "gla"}, DATA)
        courier = new_courier(tracker, storage, run_id, steps=12)
        append(storage, log_of(range(1, 5)))
        courier.poll()
        assert steps_of(tracker, run_id) == [1, 2, 3, 4]

        server.kill()
        append(storage, log_of(range(5, 9)))
        with caplog.at_level(logging.WARNING):
            courier.poll()  # raises nothing
        assert "training goes on, they are kept and sent later" in caplog.text
        result = result_of(TRIAL, 12)
        write_outcome(storage, TRIAL, result)
        append(storage, log_of(range(9, 13)))
        assert not courier.deliver_result(TRIAL, result, 1e9)
        courier.mark_ended(TRIAL, "KILLED")  # raises nothing either

        server.start()
        courier.poll()
        assert steps_of(tracker, run_id) == list(range(1, 13)) == steps_of(tracker, run_id, SPEED)
        assert courier.deliver_result(TRIAL, result, 1e9)
        assert tracker.status(run_id) == "FINISHED"
        assert "model/model.safetensors" in {f.path for f in tracker._client.list_artifacts(run_id, "model")}

        again = Tracker(server.uri, None)  # the next driver
        again.open_study("remote", "which?")
        assert again.open_trial(TRIAL, "gla", {"decay": "gla"}, DATA) == run_id
        new_courier(again, storage, run_id, steps=12).poll()
        assert steps_of(again, run_id, SPEED) == list(range(1, 13)) and again.status(run_id) == "FINISHED"
    finally:
        server.kill()


class Gateway(http.server.ThreadingHTTPServer):
    """Passes requests on to a server; in other modes it answers 503, loses the answer to what was done, or is slow."""

    daemon_threads = True

    def __init__(self, behind):
        self.behind, self.mode, self.broken = behind, "pass", 0
        super().__init__(("127.0.0.1", free_port()), Passing)
        self.uri = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Passing(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.do_GET()

    def do_GET(self):
        mode, gateway = self.server.mode, self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        gateway.broken += mode != "pass"
        if mode == "slow":
            time.sleep(1.0)
        status, answer = 503, b"{}"
        if mode != "away":
            link = http.client.HTTPConnection("127.0.0.1", gateway.behind, timeout=60)
            headers = {"Content-Type": self.headers.get("Content-Type", "application/json")}
            link.request(self.command, self.path, body, headers)
            response = link.getresponse()
            status, answer = (response.status, response.read()) if mode != "lost" else (503, response.read())
            link.close()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.mark.slow
@pytest.mark.faults
def test_a_server_that_refuses_loses_its_answer_or_is_slow_has_each_step_once_in_order(
    tmp_path, storage, process_env, monkeypatch
):
    monkeypatch.setattr(courier_module, "RETRY_S", 0.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    server = Server(tmp_path / "server", process_env)
    try:
        server.start()
        gateway = Gateway(server.port)
        tracker = Tracker(gateway.uri, None)
        tracker.open_study("remote", "which?")
        run_id = tracker.open_trial(TRIAL, "gla", {"decay": "gla"}, DATA)
        courier = new_courier(tracker, storage, run_id, steps=12)
        for number, mode in enumerate(("away", "lost", "slow", "lost", "pass")):
            gateway.mode, gateway.broken = mode, 0
            append(storage, log_of(range(1 + 4 * number, 5 + 4 * number)))
            courier.poll()  # raises nothing
            assert gateway.broken or mode == "pass", mode
        assert steps_of(tracker, run_id) == list(range(1, 21)) == steps_of(tracker, run_id, SPEED)
        gateway.shutdown()
        gateway.server_close()
    finally:
        server.kill()
