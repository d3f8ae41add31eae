"""One thread for rank 0's own work, beside the event loop.

Threads share the interpreter's lock. A second one would not make this work faster, and the event
loop would wait for its turn behind each of them: six answers read in six threads hold it up for
0.17 s, in one thread for 0.02 s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache, partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

THREAD_NAME = "rank-0"


@cache
def _thread() -> ThreadPoolExecutor:
    """The thread. torch computes in it without further threads, whatever it does in the caller's.

    libgomp lets no waiting thread spin once the threads of a process, those of all its teams, are
    more than the cores: each operation of the learner would then have to wake one, for 50 us.
    """
    import torch

    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=THREAD_NAME)
    threads = torch.get_num_threads()
    pool.submit(torch.get_num_threads).result()  # a thread takes the process's number here, once
    pool.submit(torch.set_num_threads, 1).result()
    torch.set_num_threads(threads)  # the process's again, which each backward pass takes
    return pool


async def in_background(function: Callable[P, T], /, *arguments: P.args, **options: P.kwargs) -> T:
    """Call a function in the thread, after what it has been asked for before.

    It must not wait for the event loop, nor for the thread itself. Cancelled, the call ends its
    work, and its result is lost.
    """
    call = partial(copy_context().run, function, *arguments, **options)
    return await asyncio.get_running_loop().run_in_executor(_thread(), call)
