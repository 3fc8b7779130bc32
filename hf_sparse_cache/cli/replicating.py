"""`serve --replicas N`: a fleet on this machine, on Ray Serve. It is made in `hf_sparse_cache.serving.ray_app`."""

import importlib.util
import os
import signal
import threading
from collections.abc import Mapping
from typing import Any

from .screen import Screen


# Ray waits a minute for its proxy, which a busy machine needs for the imports alone.
_MOST_STARTS = 10


def run(asked: Mapping[str, Any]) -> None:
    """Serve until told to stop.

    Args:
        asked: the options of the command.

    Raises:
        ImportError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise ImportError("--replicas needs ray: pip install 'hf_sparse_cache[ray]'")
    if asked["disk_memory"] is not None:
        raise ValueError("--disk-memory is for one process, and --replicas are several; give them a --shared folder")
    import ray
    from ray import serve

    from ..serving.options import RayOptions
    from ..serving.ray_app import build

    fleet = RayOptions(
        # As many as the machine has, in equal parts: a replica that asks for more than there is would never start.
        cpus=min(1.0, (os.cpu_count() or 1) / (asked["replicas"] + 1)),
        **{name: value for name, value in asked.items() if name in RayOptions.model_fields},
    )
    screen, url = Screen(), f"http://{asked['host']}:{asked['port']}"
    http_options = {"host": asked["host"], "port": asked["port"], "request_timeout_s": fleet.timeout or None}
    # Ray's own 15 is for work behind others' backs; replicas run as whoever starts them does.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(include_dashboard=False, log_to_driver=asked["log_level"] == "debug", logging_level=asked["log_level"])
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray, which has others that end at once
        signal.signal(number, _told_to_stop)
    try:
        _start(http_options, screen)
        serve.run(build(fleet))
        screen.say(
            f"{fleet.replicas} replicas of {fleet.model}, {fleet.exactness} mode, prefixes of {fleet.max_memory} each"
        )
        screen.say(f"{url}/v1 for clients, {url}/metrics for Prometheus")
        threading.Event().wait()
    except KeyboardInterrupt:
        screen.say("stopping: no request comes in, those that run have their time to end")
    finally:
        serve.shutdown()
        ray.shutdown()


def _told_to_stop(*_: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # once: what runs comes to its end
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _start(http_options: dict[str, Any], screen: Screen) -> None:
    """Start Ray Serve, with as much patience as a slow machine needs: another call finds what the one before began.

    Raises:
        TimeoutError: It does not come.
    """
    from ray import serve

    for left in reversed(range(_MOST_STARTS)):
        try:
            serve.start(http_options=http_options)
            return
        except TimeoutError:
            if not left:
                raise
            screen.say("Ray Serve takes its time to start; waiting for it")
