"""Sweeps: the same files as serial runs, whoever is killed on the way."""

import multiprocessing
import os
import re
import select
import signal
import sys
import threading
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kvtrim
from kvtrim.bench.eval import evaluate, scores
from kvtrim.bench.sweep import pool_local, pool_ray
from kvtrim.bench.sweep.pool_local import LocalPool
from kvtrim.bench.sweep.queue import Driver
from kvtrim.bench.sweep.spec import load, pieces
from kvtrim.bench.sweep.worker import Worker
from kvtrim.cli import main, sweep
from kvtrim.errors import KvtrimError, UnknownNameError, UsageError
from kvtrim.tasks.rows import Rows
from processes import fork, kill

AGNOSTIC = "question-agnostic"
FILES = ("run.json", "inputs.jsonl", "samples.jsonl", "scores.jsonl", "eval.md")
TOML = """
tasks = ["bench.questions:WORDS_TASK", "bench.questions:PREFIXED"]
methods = ["snapkv", "adakv"]
keeps = [48]
protocols = ["question-agnostic"]
limit = 3
batch = 6
chunk = 2
threads = 1
models = ["{model}"]
set = {{ window = 8 }}
"""


@pytest.fixture
def asked(model_folder, tmp_path):
    """A sweep's file."""
    path = tmp_path / "sweep.toml"
    path.write_text(TOML.format(model=model_folder))
    return path


@pytest.fixture(scope="module")
def serial(model_folder, tmp_path_factory):
    """What `kvtrim eval` makes of the same."""
    folder = tmp_path_factory.mktemp("serial")
    path = folder / "sweep.toml"
    path.write_text(TOML.format(model=model_folder))
    (job,) = load(path).jobs()
    torch.set_num_threads(1)
    subject = evaluate.Subject(str(model_folder), *kvtrim.load(model_folder, device="cpu"))
    evaluate.evaluate(subject, job.grid(), Rows(), folder / "run")
    scores.derive(folder / "run", job.grid().tasks)
    return folder / "run"


class Inside:
    """Workers in this very process; some of them die at some of their pieces."""

    def __init__(self, size=2, dies=lambda count: False):
        self.size, self.dies, self.count, self.waiting, self.started = size, dies, 0, [], 0
        self.closed = False

    def start(self):
        self.started += 1
        return Worker(), self.started

    def give(self, worker, piece):
        self.waiting.append((worker, piece))

    def wait(self):
        worker, piece = self.waiting.pop()  # the last one first: order must not matter
        self.count += 1
        if self.dies(self.count):
            return worker, None
        return worker, worker[0].do(piece)

    def close(self):
        self.waiting, self.closed = [], True


def same(folder, serial, files=FILES):
    for name in files:
        mine, theirs = ((f / name).read_text() for f in (folder, serial))
        if name == "run.json":
            mine, theirs = (re.sub(r'"(date|commit|dirty)": .*', "", x) for x in (mine, theirs))
        assert mine == theirs, name
    return True


def test_a_sweep_writes_what_serial_runs_write(asked, serial, tmp_path):
    (folder,) = Driver(load(asked), tmp_path / "out", Inside()).run()
    assert same(folder, serial) and not (folder / "parts").exists()
    pool = Inside()
    assert Driver(load(asked), tmp_path / "out", pool).run() == [folder]
    assert pool.started == 0 and pool.closed  # nothing is left to do


def test_the_work_of_dead_workers_is_done_by_others(asked, serial, tmp_path):
    pool = Inside(dies=lambda count: count in (1, 3, 4))
    (folder,) = Driver(load(asked), tmp_path / "out", pool).run()
    assert same(folder, serial) and pool.started == 5


def test_work_that_kills_every_worker_is_given_up_and_the_rest_is_kept(asked, serial, tmp_path):
    with pytest.raises(KvtrimError, match="workers died 3 times"):
        Driver(load(asked), tmp_path / "out", Inside(dies=lambda count: count > 2)).run()
    (folder,) = Driver(load(asked), tmp_path / "out", Inside()).run()
    assert same(folder, serial)


@pytest.mark.parametrize("chunk", [1, 3])
def test_work_that_is_cut_up_in_another_way_is_gone_on_with(asked, serial, tmp_path, chunk):
    with pytest.raises(KvtrimError, match="workers died"):
        Driver(load(asked), tmp_path / "out", Inside(dies=lambda count: count > 2)).run()
    assert list(tmp_path.glob("out/*/parts/*/samples.jsonl"))
    asked.write_text(asked.read_text().replace("chunk = 2", f"chunk = {chunk}"))
    (folder,) = Driver(load(asked), tmp_path / "out", Inside()).run()
    assert same(folder, serial)


def test_what_kvtrim_refuses_ends_the_sweep_with_its_reason(asked, tmp_path):
    asked.write_text("lengths = [9000]\n" + asked.read_text())
    with pytest.raises(KvtrimError, match="--length 9000"):
        Driver(load(asked), tmp_path / "out", Inside()).run()


def test_data_that_are_missing_are_named_before_a_worker_starts(asked, tmp_path):
    asked.write_text(asked.read_text().replace('PREFIXED"', 'PREFIXED", "gsm8k"'))
    (tmp_path / "empty").mkdir()
    asked.write_text('data = "empty"\n' + asked.read_text())
    pool = Inside()
    with pytest.raises(UsageError, match="gsm8k"):
        Driver(load(asked), tmp_path / "out", pool).run()
    assert pool.started == 0 and pool.closed


def test_another_sweep_in_the_folder_is_refused(asked, tmp_path):
    Driver(load(asked), tmp_path / "out", Inside()).run()
    asked.write_text(asked.read_text().replace("limit = 3", "limit = 2"))
    pool = Inside()
    with pytest.raises(UsageError, match="limit: 3 there, 2 here"):
        Driver(load(asked), tmp_path / "out", pool).run()
    assert pool.closed


def test_protocols_and_lengths_are_folders_of_their_own(asked, tmp_path):
    text = asked.read_text().replace(AGNOSTIC + '"', AGNOSTIC + '", "question-aware"')
    asked.write_text("lengths = [128, 200]\n" + text.replace("limit = 3", "limit = 1"))
    folders = Driver(load(asked), tmp_path / "out", Inside()).run()
    short = Path(load(asked).models[0]).name
    assert [folder.name for folder in folders] == [
        f"{short}-{protocol}-{length}"
        for protocol in (AGNOSTIC, "question-aware")
        for length in (128, 200)
    ]
    assert all((folder / "eval.md").exists() for folder in folders)


def test_pieces_hold_whole_units_of_one_task(asked):
    (job,) = load(asked).jobs()
    units = [("a", 2), ("a", 2), ("a", 1), ("b", 1), ("b", 2), ("b", 4)]
    cut = pieces(job, "out", units, chunk=3)
    assert [(one.start, one.stop, one.samples) for one in cut] == [
        (0, 2, 4), (2, 3, 1), (3, 5, 3), (5, 6, 4)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (("limit = 3", "limt = 5"), UnknownNameError, "did you mean 'limit'"),
        (("limit = 3", "limit = 0"), UsageError, "at least 1"),
        (('"question-agnostic"', '"both"'), UsageError, "'both' is none"),
        (("keeps = [48]", "keeps = 48"), UsageError, "must be a list"),
        (("keeps = [48]", ""), UsageError, "names no keeps"),
        (("keeps = [48]", "keeps = []"), UsageError, "keeps is empty"),
        (("keeps = [48]", "keeps = [true]"), UsageError, "keeps = .*use budgets"),
        (("keeps = [48]", "keeps = [48, 48]"), UsageError, "keeps names 48 twice"),
        (("limit = 3", "lengths = []"), UsageError, "lengths is empty"),
        (("limit = 3", "lengths = [-5]"), UsageError, r"lengths = \[-5\]: use whole numbers"),
        (("limit = 3", 'lengths = ["2048"]'), UsageError, "without quotes"),
        (("limit = 3", "data = 5"), UsageError, "data = 5: use text in quotes"),
        (("limit = 3", 'seed = "a"'), UsageError, "seed = 'a': use a whole number"),
        (("limit = 3", "seed = true"), UsageError, "seed = True: use a whole number"),
        (("limit = 3", "retries = -1"), UsageError, "retries = -1: use a whole number"),
        (("limit = 3", "fitting = 1"), UsageError, "use true or false"),
        (("set = { window = 8 }", "set = 5"), UsageError, "set must be a table"),
        (('models = ["', 'models = [] # ["'), UsageError, "models is empty"),
        (('models = ["', 'models = [5, "'), UsageError, "models = .*use texts"),
        (
            ('"question-agnostic"', '"question-agnostic", "question-agnostic"'),
            UsageError,
            "protocols names 'question-agnostic' twice",
        ),
        (('"snapkv"', '"snapvk"'), UnknownNameError, "did you mean 'snapkv'"),
        (("window = 8", "windw = 8"), UnknownNameError, "did you mean 'window'"),
        (("WORDS_TASK", "NO_TASK"), UsageError, "NO_TASK"),
        (("limit = 3", "limit = "), UsageError, "no TOML"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_runs(asked, changed, error, message):
    asked.write_text(asked.read_text().replace(*changed))
    with pytest.raises(error, match=message):
        load(asked)


def for_workers():
    """So that workers of Ray find tests and tasks, and do not wait for whatever else there is."""
    here = Path(__file__).parents[1]
    paths = [str(here), str(here.parent / "src"), os.environ.get("PYTHONPATH", "")]
    own = {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}  # threads as this process has
    return {"PYTHONPATH": os.pathsep.join(paths), "RAY_worker_niceness": "0"} | own


def kills_the_first(pool, killed):
    """Progress of a driver that kills a worker of its own, whose work nobody has done before."""

    def progress(what, done, out_of):
        if not killed and done >= 4:
            killed.append(pool.processes[0])
            os.kill(killed[0], signal.SIGKILL)

    return progress


def begin_a_driver(asked, folder):
    """A sweep as a process of its own with one worker; it waits until `folder / "how"` is there,
    whose words it takes as further options.
    """
    asked.write_text(asked.read_text().replace("chunk = 2", "chunk = 1"))

    def later():
        while not (folder / "how").exists():
            time.sleep(0.05)
        sys.argv += (folder / "how").read_text().split()
        main()

    command = ["sweep", str(asked), "--out", "out", "--workers", "1"]
    return fork(later, "kvtrim", *command, folder=folder, **for_workers())


def kill_the_driver(process, folder, *how):
    """Let it begin, and kill it at its first part."""
    (folder / "waits").write_text(" ".join(how))
    (folder / "waits").rename(folder / "how")

    def begun():
        return list(folder.glob("out/*/parts/*/samples.jsonl"))

    kill(process, begun, "no part was begun")
    assert not list(folder.glob("out/*/samples.jsonl"))


@pytest.mark.process
def test_killed_drivers_are_gone_on_with_and_killed_processes_replaced(asked, serial, tmp_path):
    pool, killed = LocalPool(2), []
    forkserver.ensure_running()  # whose modules the driver's workers share
    kill_the_driver(begin_a_driver(asked, tmp_path), tmp_path)
    progress = kills_the_first(pool, killed)
    (folder,) = Driver(load(asked), tmp_path / "out", pool, progress=progress).run()
    assert killed and same(folder, serial)


@pytest.mark.process
@pytest.mark.filterwarnings("ignore")
def test_killed_drivers_are_gone_on_with_and_killed_workers_of_ray_replaced(
    asked, serial, tmp_path, monkeypatch
):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvtrim[ray]'")
    for name, value in for_workers().items():
        monkeypatch.setenv(name, value)
    process = begin_a_driver(asked, tmp_path)  # before this process has anything of Ray
    cluster = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        kill_the_driver(process, tmp_path, "--ray-address", cluster.address_info["address"])
        pool, killed = pool_ray.RayPool(size=1), []
        progress = kills_the_first(pool, killed)
        (folder,) = Driver(load(asked), tmp_path / "out", pool, progress=progress).run()
    finally:
        ray.shutdown()
        process.kill()
    assert killed and same(folder, serial)


def busy_worker(held):
    """A process that is at something, and holds this end of a pipe as long as it lives."""
    threading.Thread(target=pool_local._end_with_driver, daemon=True).start()
    os.write(held, b"at work")
    time.sleep(60)


def driver_of_one(held):
    multiprocessing.get_context("fork").Process(target=busy_worker, args=(held,)).start()
    os.close(held)
    time.sleep(60)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_ends_with_its_driver_whatever_it_is_at(how):
    seen, held = os.pipe()
    driver = multiprocessing.get_context("fork").Process(target=driver_of_one, args=(held,))
    driver.start()
    os.close(held)
    assert os.read(seen, 100) == b"at work"
    os.kill(driver.pid, how)
    driver.join()
    assert select.select([seen], [], [], 20)[0] and os.read(seen, 100) == b""  # nobody holds it
    os.close(seen)


class Idle(Inside):
    """Workers of which one dies with nothing to do, as soon as there is such a one."""

    def __init__(self):
        super().__init__(3)
        self.all, self.died = [], None

    def start(self):
        self.all.append(super().start())
        return self.all[-1]

    def wait(self):
        idle = [one for one in self.all if one not in [worker for worker, _ in self.waiting]]
        if self.count > 3 and idle and self.died is None:
            self.died = idle[0]
            return self.died, None
        return super().wait()

    def give(self, worker, piece):
        assert worker is not self.died
        super().give(worker, piece)


def test_a_worker_that_dies_with_nothing_to_do_is_not_missed(asked, serial, tmp_path):
    pool = Idle()
    (folder,) = Driver(load(asked), tmp_path / "out", pool).run()
    assert pool.died is not None and same(folder, serial)


def test_a_job_without_samples_is_done_and_the_others_go_on(asked, tmp_path, capsys):
    text = asked.read_text().replace("limit = 3", "limit = 1\nlengths = [8, 200]")
    asked.write_text("fitting = true\n" + text)
    empty, other = Driver(load(asked), tmp_path / "out", Inside()).run()
    assert (empty / "samples.jsonl").read_text() == "" and (empty / "eval.md").exists()
    assert (other / "samples.jsonl").read_text()
    pool = Inside()
    assert Driver(load(asked), tmp_path / "out", pool).run() and pool.started == 0
    sweep._show([empty, other], True)
    said = capsys.readouterr().err
    assert f"{empty.name}: no samples of" in said and "fitting" in said
    assert f"{other.name}: no samples" not in said


@pytest.mark.parametrize(
    ("machines", "asked_for", "room", "needs"),
    [
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 3}], {"size": 8}, 5, {"num_gpus": 1}),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 3}], {"gpus": 2}, 2, {"num_gpus": 2}),
        ([{"CPU": 8, "GPU": 4}], {"size": 2}, 2, {"num_gpus": 1}),
        ([{"CPU": 3}, {"CPU": 3}], {"size": 9, "threads": 2}, 2, {"num_cpus": 2}),
        ([{"CPU": 1, "GPU": 4}], {"size": 4}, 1, {"num_gpus": 1, "num_cpus": 1}),
        ([{"CPU": 8, "GPU": 2}], {"gpus": 4}, 0, "gpus = 4"),
        ([{"CPU": 2}], {"threads": 4}, 0, "threads = 4"),
    ],
)
def test_no_more_ray_workers_than_there_is_room_for(
    monkeypatch, capsys, machines, asked_for, room, needs
):
    nodes = [{"Alive": True, "Resources": one} for one in machines]
    nodes.append({"Alive": False, "Resources": {"CPU": 64, "GPU": 64}})
    given = {}
    ray = SimpleNamespace(
        is_initialized=lambda: True,
        nodes=lambda: nodes,
        remote=lambda **own: given.update(own) or (lambda actor: actor),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    if not room:
        with pytest.raises(UsageError, match=needs):
            pool_ray.RayPool(**asked_for)
        return
    assert pool_ray.RayPool(**asked_for).size == room
    assert needs.items() <= given.items()
    own = SimpleNamespace(threads=asked_for.get("threads"), gpus=asked_for.get("gpus", 1))
    pool = sweep.make_pool(own, 99, True, None)
    assert f"the cluster has room for {pool.size} of 99 workers" in capsys.readouterr().err


def test_several_ray_workers_are_waited_for_together(monkeypatch):
    class Died(Exception):
        pass

    class Actor:
        def __init__(self, folder):
            self.do = SimpleNamespace(remote=lambda piece: (self, piece))

    def get(reference):
        _, piece = reference
        if piece == "deadly":
            raise Died
        return {"process": len(piece)}

    ray = SimpleNamespace(
        is_initialized=lambda: True,
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 2}}],
        remote=lambda **own: lambda actor: SimpleNamespace(remote=Actor),
        wait=lambda busy, num_returns: (busy[-1:], busy[:-1]),  # whoever was given work last
        get=get,
        exceptions=SimpleNamespace(RayActorError=Died),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    pool = pool_ray.RayPool()
    one, other = pool.start(), pool.start()
    pool.give(one, "first")
    pool.give(other, "second")
    assert pool.wait() == (other, {"process": 6})
    pool.give(other, "deadly")
    assert pool.processes == [6] and pool.wait() == (other, None) and pool.processes == []
    assert pool.wait() == (one, {"process": 5}) and pool.processes == [5]


def test_ray_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'kvtrim\[ray\]'"):
        pool_ray.RayPool()


def test_two_processes_do_not_write_into_one_folder(asked, tmp_path):
    from kvtrim.records.run_folder import RunFolder

    book = RunFolder(tmp_path)
    with pytest.raises(UsageError, match="another process is measuring"):
        RunFolder(tmp_path)
    book.close()
    RunFolder(tmp_path).close()
