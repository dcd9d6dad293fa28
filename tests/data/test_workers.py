"""Jobs that several processes share: results in order, one error for a fault, no process left."""
import os
from functools import partial
from math import isqrt

import psutil
import pytest

from kdocr.core import KdocrError
from kdocr.data.icpr import read_image
from kdocr.data.workers import map_jobs


@pytest.mark.parametrize('workers', [1, 2, 3])
def test_results_are_in_the_order_of_jobs(workers):
    assert map_jobs(isqrt, range(200), workers) == [isqrt(n) for n in range(200)]
    assert map_jobs(isqrt, [], workers) == []


@pytest.mark.parametrize('workers', [1, 2])
def test_the_fault_of_a_job_is_raised_and_the_processes_end(workers):
    before = set(psutil.Process().children())
    with pytest.raises(FileNotFoundError) as e: map_jobs(os.stat, ['/nowhere/x'] * 120, workers)
    assert e.value.filename == '/nowhere/x'
    with pytest.raises(KdocrError, match='/nowhere/y.png: No such file'): map_jobs(read_image, ['/nowhere/y.png'] * 120, workers)
    assert set(psutil.Process().children()) == before


def test_a_process_that_dies_is_told():
    with pytest.raises(KdocrError, match='a worker process was killed'): map_jobs(os._exit, range(120), 2)


def test_few_jobs_start_no_process():
    assert set(map_jobs(partial(max, os.getpid()), [0] * 99, 9)) == {os.getpid()}
    assert map_jobs(eval, ['__import__("os").getpid()'] * 99, 9) == [os.getpid()] * 99
