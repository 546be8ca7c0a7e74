"""PyTorch's own switches: turned inside our calls, and as the user left them afterwards."""

import linecache
import signal
import sys
import threading

import pytest
import torch
from oracles import draw
from torch import nn

import msif_lab as msif
from msif_lab.objective import switches
from msif_lab.objective.switches import CUDNN_OFF, EXACT, FUSED_OFF

SWITCHES = (FUSED_OFF, CUDNN_OFF, EXACT)


def state():
    return [switch.read() for switch in SWITCHES]


def both():
    return switches.exact_products(), switches.twice_differentiable(nn.LSTM(2, 2))


def test_everything_is_turned_inside_and_back_outside():
    before = state()
    exact, twice = both()
    with exact, twice:
        inside = state()
        assert not any(inside[0][name] for name in ("flash", "mem_efficient", "cudnn", "fast path"))
        assert inside[0]["math"]
        assert not inside[1]["enabled"]
        assert set(inside[2].values()) <= {"ieee", False, "highest"}
    assert state() == before
    assert before[0]["flash"]  # PyTorch's default: inside differs from outside
    assert before != inside


def test_values_that_a_user_has_set_come_back():
    torch.backends.cuda.enable_flash_sdp(False)
    torch.set_float32_matmul_precision("medium")
    try:
        before = state()
        exact, twice = both()
        with exact, twice:
            assert state() != before
        assert state() == before
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
        torch.set_float32_matmul_precision("highest")


def interrupted(at):
    """Enter and leave, with an interrupt before the line of this number; whether there was one."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if frame.f_code.co_filename != switches.__file__:
            return None
        # Only a tracer can come between a body and its lock's release, a signal cannot.
        lock = "with self.lock" in linecache.getline(switches.__file__, frame.f_lineno)
        if event == "line" and not lock:
            count += 1
            if count == at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        exact, twice = both()
        with exact, twice:
            pass
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_line_leaves_nothing_turned_for_good():
    before, at = state(), 1
    while interrupted(at):
        with FUSED_OFF.turned(), CUDNN_OFF.turned(), EXACT.turned():  # and the next call works
            assert not torch.backends.cuda.flash_sdp_enabled()
        assert state() == before, at
        assert not any(switch.inside for switch in SWITCHES), at
        at += 1
    assert at > 50


@pytest.mark.skipif(sys.platform == "win32", reason="no interval timers")
def test_real_interrupts_leave_nothing_turned():
    def interrupt(number, frame):
        raise KeyboardInterrupt

    before, caught, recurrent = state(), 0, nn.LSTM(2, 2)
    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(1500):
            try:
                signal.setitimer(signal.ITIMER_REAL, 5e-5 + 3e-7 * i)
                while True:
                    with EXACT.turned(), switches.twice_differentiable(recurrent):
                        pass
            except KeyboardInterrupt:
                caught += 1
            assert state() == before, i
            assert not any(switch.inside for switch in SWITCHES), i
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert caught == 1500


def test_threads_that_overlap_in_any_order():
    flash = torch.backends.cuda.flash_sdp_enabled()
    first, second = FUSED_OFF.turned(), FUSED_OFF.turned()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.cuda.flash_sdp_enabled()  # the second is still at work
    second.__exit__(None, None, None)
    assert torch.backends.cuda.flash_sdp_enabled() == flash
    assert flash  # torch's default: the restored state differs from the one inside


def test_many_threads():
    before, seen = state(), []

    def work():
        for _ in range(200):
            with FUSED_OFF.turned(), EXACT.turned():
                seen.append(torch.backends.cuda.flash_sdp_enabled())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(seen)
    assert state() == before


@pytest.mark.skipif(not switches.ROUNDED, reason="an older PyTorch has only the older settings")
def test_the_newer_settings_of_precision_may_be_in_use():
    """Once they are, PyTorch refuses to read the older ones."""
    matmul = torch.backends.cuda.matmul
    before, torch.backends.cuda.matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        torch.manual_seed(0)
        data = msif.Examples(draw(12, 4).float(), torch.arange(12) % 3)
        stage = msif.Stage("a", nn.Linear(4, 3), data, recipe=msif.SGD(0.1, epochs=1))
        msif.Pipeline([stage]).fit(progress=False)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
