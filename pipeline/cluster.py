"""Ray: connect, see that what is asked for is there, watch for silence, and bring errors of workers home as our own."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from . import embedded
from .errors import ClusterError, ClusterLostError, PipelineError, first_line
from .lifeline import call, in_thread
from .observe import duration, every, say
from .spec import ResourcesSection, ScoreResources, TuneResources

MOST_THREADS = 16
"""Of a worker of stage tune that has a machine to itself."""
SILENCE_S = 300.0
"""Without progress for so long, the watchdog says what the cluster has free."""
EXECUTOR_ENDS_WITHIN_S = 10.0
_QUIET = ("ray", "ray.data", "ray.train", "ray.tune")
_Value = TypeVar("_Value")


@contextmanager
def connected(resources: ResourcesSection) -> Iterator[None]:
    """A Ray cluster for the time of the block: one that is connected already, the spec's, RAY_ADDRESS's, or an embedded one.

    Raises:
        ClusterError: The cluster cannot be reached.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # the controller's poll, 2 s by default
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # else the rest of an interrupted stage starts another Ray
    if is_connected():
        yield
        return
    address = resources.address or os.environ.get("RAY_ADDRESS")
    with nullcontext() if address else embedded.closed_environment():
        over = threading.Event()
        try:
            _connect(address, over)
            yield
        except (ClusterLostError, SystemExit):
            raise  # Ray waits in vain for what is gone; and what ends this process ends its children, Ray's processes
        except BaseException as error:
            _end_executors(error)
            _shut_down(over)
            raise
        else:
            _shut_down(over)


def is_connected() -> bool:
    """Whether this process has a Ray, without importing it."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def _connect(address: str | None, over: threading.Event) -> None:
    """Connect to the cluster, or start an embedded one, whose processes end when it is over.

    In a thread, as in the main one Ray takes SIGTERM over. The kernel kills processes of an embedded Ray when the thread ends
    that started them.
    """

    def connect() -> None:
        import ray

        logging.getLogger("ray").setLevel(logging.ERROR)
        if address:
            ray.init(
                address=address, logging_level=logging.ERROR, log_to_driver=False, runtime_env=runtime_environment()
            )
        else:
            embedded.start(runtime_env=runtime_environment())

    try:
        in_thread(connect, "connect", over).result()
    except Exception as error:  # Ray raises bare ones, too: of a node that does not start in time
        raise ClusterError(f"Ray at {address or 'this machine'}: {error}", _hint(address, error)) from error
    if threading.current_thread() is threading.main_thread():
        # again, as Ray's native code has put one in front that prints a stack
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    if address and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        say(
            f"warning: Ray at {address} has no token: everybody who reaches its ports runs code as its user; "
            "start it with RAY_AUTH_MODE=token"
        )
    quieten()


def _hint(address: str | None, error: Exception) -> str:
    from ray.exceptions import AuthenticationError

    if isinstance(error, AuthenticationError) or isinstance(error.__cause__, AuthenticationError):
        return "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token or its file"
    return "check resources.address or RAY_ADDRESS" if address else "is the machine very busy? Give the command again"


def _shut_down(over: threading.Event) -> None:
    import ray

    ray.shutdown()
    over.set()


def _end_executors(error: BaseException) -> None:
    """Let what Ray Data left in interrupted frames end before Ray does.

    Later, the garbage collector's call would start another Ray, and a thread that is within a call takes the process with it.
    """
    traceback.clear_frames(error.__traceback__)
    for thread in threading.enumerate():
        if thread.name.startswith("StreamingExecutor"):
            thread.join(EXECUTOR_ENDS_WITHIN_S)


def runtime_environment() -> dict[str, dict[str, str]]:
    """Workers import what the driver can import: its working directory and PYTHONPATH.

    Inside a submitted job this is the job's own runtime environment's business: its working_dir lies elsewhere on each node.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return {}
    own = (sys.prefix, sys.base_prefix)
    here = [path for path in sys.path if path and os.path.isdir(path) and not path.startswith(own)]
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(here)}}


def quieten() -> None:
    """Let Ray's libraries report errors only."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)


def require(workers: int, cpus: float, gpus: float, what: str) -> None:
    """See that the cluster has room for so many workers.

    Raises:
        ClusterError: It has not; with what is there.
    """
    import ray

    there = ray.cluster_resources()
    for kind, each in (("GPU", gpus), ("CPU", cpus)):
        if workers * each > there.get(kind, 0.0):
            raise ClusterError(
                f"{what}: asked for {workers} x {each:g} {kind}, the cluster has {there.get(kind, 0.0):g}",
                "lower the numbers in the spec's `resources`, or connect to a larger cluster",
            )


def room(cpus: float, gpus: float, what: str) -> int:
    """How many workers fit, leaving one CPU to Ray's own tasks (a cluster full of actors can hang).

    Raises:
        ClusterError: Not even one fits.
    """
    import ray

    require(1, cpus, gpus, what)
    there = ray.cluster_resources()
    by_cpu = (there.get("CPU", 0.0) - 1) // cpus
    return max(1, int(min(by_cpu, there.get("GPU", 0.0) // gpus) if gpus else by_cpu))


def tuning_cpus(resources: TuneResources) -> float:
    """CPUs of each worker of stage tune, as the spec says or as its default has it."""
    import ray

    if resources.cpus is not None:
        return resources.cpus
    if resources.workers > 1 or resources.gpus:
        return 1.0
    largest = max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    return float(max(1, min(int(largest) - 1, MOST_THREADS)))


def actors_of(resources: ScoreResources, works: int) -> int:
    """Actors to start: as many as the spec says, else as there is room for; no more than there is work. Raises ClusterError."""
    if resources.actors is None:
        return min(room(resources.cpus, resources.gpus, "resources.score"), works)
    actors = min(resources.actors, works)
    require(actors, resources.cpus, resources.gpus, "resources.score")
    return actors


def on_cluster(stage: str, action: Callable[[], _Value]) -> _Value:
    """Do something with Ray and wait for it, so that signals and the cluster's end are answered at once; what it returns.

    Workers' errors come home: our own as they were, Ray's as ClusterError.

    Raises:
        PipelineError: Of a worker.
        ClusterError: A worker died too often, or Ray failed.
        ClusterLostError: The cluster is gone.
    """
    from ray.data.exceptions import SystemException, UserCodeException
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    try:
        return call(stage, action)
    except (RayError, TrainingFailedError, UserCodeException, SystemException) as error:
        raise as_pipeline_error(error, stage) from error


def as_pipeline_error(error: BaseException, stage: str) -> PipelineError:
    """The PipelineError inside a Ray exception, or a ClusterError that says what Ray said."""
    from ray.exceptions import RayError

    seen: list[BaseException] = []
    queue: list[BaseException | None] = [error]
    while queue:
        item = queue.pop(0)
        if item is None or item in seen:
            continue
        # Ray's own error takes on its cause's kind as well: only the cause itself has the message.
        if isinstance(item, PipelineError) and not isinstance(item, RayError):
            return item
        seen.append(item)
        queue += [getattr(item, "cause", None), item.__cause__, item.__context__]
        queue += list(getattr(item, "worker_failures", {}).values())
    return ClusterError(
        f"stage {stage}: {type(error).__name__}: {first_line(error)}",
        "what is committed stays; run the same command again to go on from there",
    )


class Watchdog:
    """Says so when nothing was done for a while: a pipeline that waits for resources looks the same as one that works."""

    def __init__(self, stage: str, silence_s: float = SILENCE_S, detail: Callable[[], str] = str) -> None:
        self._stage, self._silence_s, self._detail = stage, silence_s, detail
        self._fed_s = self._said_s = time.monotonic()

    def feed(self) -> None:
        """Something was done."""
        self._fed_s = time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Watch for the time of the block."""
        with every(min(self._silence_s, 10.0), self._look):
            yield self

    def _look(self) -> None:
        import ray

        now = time.monotonic()
        if now - max(self._fed_s, self._said_s) < self._silence_s or not ray.is_initialized():
            return
        self._said_s = now
        free = ray.available_resources()
        say(
            f"warning: stage {self._stage}: nothing was finished for {duration(now - self._fed_s)}; the cluster has "
            f"{free.get('CPU', 0.0):g} CPU and {free.get('GPU', 0.0):g} GPU free{self._detail()}"
        )
