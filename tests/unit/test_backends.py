"""Which backend serves a call: by name, by environment, automatically; refusals and the one warning for each reason."""

import warnings

import pytest
import torch

from gdn_cp import choose_backend
from gdn_cp.kernels import backends
from gdn_cp.kernels.backends import Choice, DeltaRuleCall


def a_call(device_type="cpu", **changes) -> DeltaRuleCall:
    capability = (9, 0) if device_type == "cuda" else None
    call = {"dtype": torch.bfloat16, "gate_dtype": torch.float32, "beta_dtype": None}
    sizes = {"B": 1, "T": 128, "H": 2, "HV": 4, "K": 64, "V": 64, "N": 1}
    return DeltaRuleCall(**({"device_type": device_type, "capability": capability} | call | sizes | changes))


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch):
    monkeypatch.delenv("GDN_CP_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_warned", set())


@pytest.mark.parametrize("name", ["reference", "recurrent"])
def test_name_by_argument_or_environment(monkeypatch, name):
    assert choose_backend(a_call(), name) == Choice(name, "asked for by the argument backend")
    monkeypatch.setenv("GDN_CP_BACKEND", name)
    assert choose_backend(a_call()) == Choice(name, "asked for by the environment variable GDN_CP_BACKEND")


def test_argument_beats_environment(monkeypatch):
    monkeypatch.setenv("GDN_CP_BACKEND", "recurrent")
    assert choose_backend(a_call(), "reference").backend == "reference"
    assert choose_backend(a_call(), "auto").backend == "reference"


@pytest.mark.parametrize("value", ["", "auto"])
def test_automatic_on_cpu_is_the_reference_without_a_warning(monkeypatch, value):
    monkeypatch.setenv("GDN_CP_BACKEND", value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend(a_call()) == Choice("reference", "the tensors are on cpu")


def test_unknown_name_says_where_it_came_from(monkeypatch):
    with pytest.raises(ValueError, match=r"unknown backend 'fast' from the argument backend: choose one of triton"):
        choose_backend(a_call(), "fast")
    monkeypatch.setenv("GDN_CP_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"unknown backend 'fast' from the environment variable GDN_CP_BACKEND"):
        choose_backend(a_call())


def test_triton_by_name_on_cpu_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"'triton', asked for by the argument backend.*its tensors are on cpu"):
        choose_backend(a_call(), "triton")


def test_triton_under_its_interpreter_may_serve_cpu_tensors_when_asked(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend(a_call(dtype=torch.float32), "triton").backend == "triton"
    assert choose_backend(a_call(dtype=torch.float32)).backend == "reference"


def test_automatic_on_cuda_takes_triton_when_it_can(monkeypatch):
    monkeypatch.setattr(backends, "triton_refusal", lambda call: None)
    assert choose_backend(a_call("cuda")).backend == "triton"


def test_automatic_on_cuda_falls_back_with_one_warning_for_each_reason(monkeypatch):
    monkeypatch.setattr(backends, "triton_refusal", lambda call: f"its head dim K = {call.K} is odd")
    with pytest.warns(RuntimeWarning, match=r"its head dim K = 63 is odd; the plain torch reference runs"):
        assert choose_backend(a_call("cuda", K=63)).backend == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice = choose_backend(a_call("cuda", K=63))
    assert choice.reason == "Triton cannot serve the call: its head dim K = 63 is odd"
    with pytest.warns(RuntimeWarning, match=r"K = 65"):
        choose_backend(a_call("cuda", K=65))


def test_named_triton_that_cannot_serve_raises_with_the_reason(monkeypatch):
    monkeypatch.setattr(backends, "triton_refusal", lambda call: "its head dim K = 63 is odd")
    with pytest.raises(ValueError, match=r"cannot serve this call: its head dim K = 63 is odd.*backend='auto'"):
        choose_backend(a_call("cuda", K=63), "triton")


def test_missing_triton_is_a_reason(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gdn_cp.kernels.chunk_triton", None)
    monkeypatch.delattr("gdn_cp.kernels.chunk_triton", raising=False)
    refusal = backends.triton_refusal(a_call("cuda"))
    assert refusal is not None
    assert refusal.startswith("it cannot be imported")


def test_float64_is_not_for_triton():
    pytest.importorskip("triton")
    refusal = backends.triton_refusal(a_call("cuda", dtype=torch.float64))
    assert refusal is not None
    assert "float64" in refusal
