"""The Megatron modules on GPUs: flash attention over packed batches, no wait for the device, two ranks as one."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core")

from tests.unit.test_megatron_layer import core_attention
from tests.unit.test_megatron_parallel import VOCAB, build_model, relative_error, step


@pytest.fixture
def one_gpu():
    """A world of one rank on the first GPU."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    with tempfile.NamedTemporaryFile() as store:
        torch.cuda.set_device(0)
        dist.init_process_group("nccl", init_method=f"file://{store.name}", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        yield
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.usefixtures("one_gpu")
def test_flash_attention_equals_attention_by_sequence(head_dim):
    from gdn_cp import ThdLayout
    from gdn_cp.megatron import packed_seq_params_from_layout

    layout = ThdLayout.zigzag([0, 128, 128, 132, 512], 1, seqlens=[101, 0, 4, 380], device="cuda")
    attention = core_attention()
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        inputs = [torch.randn(512, heads, head_dim, device="cuda") for heads in (4, 2, 2)]
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in inputs]
        out = attention(*leaves, packed_seq_params=packed_seq_params_from_layout(layout))
        out.float().square().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for half, exact in zip(*results, strict=True):
        assert relative_error(half.float(), exact) < 0.02  # a few roundings of 2^-9


@pytest.mark.gpu
@pytest.mark.usefixtures("one_gpu")
def test_a_step_does_not_wait_for_the_device():
    from gdn_cp import ThdLayout
    from gdn_cp.megatron import packed_seq_params_from_layout

    model = build_model(head_dim=16, cpu_initialization=False).bfloat16()
    tokens = torch.randint(0, VOCAB, (1, 256), device="cuda")
    params = packed_seq_params_from_layout(ThdLayout.zigzag([0, 96, 100, 256], 1, device="cuda"))

    def run() -> Tensor:
        hidden = model.embedding(tokens, torch.zeros_like(tokens))
        rotary = model.rotary_pos_emb(256, packed_seq=True)
        out = model.decoder(hidden, None, rotary_pos_emb=rotary, packed_seq_params=params)
        out.float().square().mean().backward()
        return out

    run()  # compiles, and fills what is kept with the batch
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isfinite().all()
    assert model.decoder.layers[0].self_attention.A_log.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.usefixtures("one_gpu")
def test_selective_recompute_gives_the_same_bits():
    model = build_model(head_dim=16, cpu_initialization=False).bfloat16()
    tokens = torch.randint(0, VOCAB, (64,), device="cuda")
    found = []
    for recompute in (False, True):
        for layer in model.decoder.layers[:3]:
            layer.self_attention.recompute_mixer = recompute
        model.zero_grad()
        found.append([step(model, tokens), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(kept, again) for kept, again in zip(*found, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("one_gpu")
@torch.no_grad()
def test_prefill_and_decode_give_the_logits_of_the_full_forward():
    from gdn_cp.megatron import GdnInferenceContext
    from tests.unit.test_megatron_inference import BATCH, PROMPT, TOTAL, logits_of, tokens

    ids = tokens().cuda()
    model = build_model(head_dim=16, cpu_initialization=False).eval()
    whole = logits_of(model, ids)
    context = GdnInferenceContext(BATCH, TOTAL, slots=4)
    found = [logits_of(model, ids[:, :PROMPT], context)]
    context.sequence_len_offset = PROMPT
    logits_of(model, ids[:, PROMPT - 3 : PROMPT], context)  # drafts, none of which is accepted
    for at in range(PROMPT, TOTAL):
        found.append(logits_of(model, ids[:, at : at + 1], context))
        context.sequence_len_offset += 1
    # float32 through three tensor-core products of 2^-11 each (tf32x3) or exact, and sums in another order
    assert relative_error(torch.cat(found, 1), whole) < 1e-4


def _two_ranks_and_one(rank: int, world_size: int) -> dict[str, Any]:
    import torch.distributed as dist
    from megatron.core import parallel_state

    tokens = torch.randint(0, VOCAB, (64,), generator=torch.Generator().manual_seed(5)).cuda()
    errors: dict[str, float] = {}
    whole = build_model(head_dim=16).cuda()
    loss = step(whole, tokens)
    gradients = {name: p.grad for name, p in whole.named_parameters()}
    model = build_model(cp=world_size, head_dim=16).cuda()
    part = step(model, tokens, cp=world_size)
    dist.all_reduce(part, group=parallel_state.get_context_parallel_group())
    for name, p in model.named_parameters():
        errors[name] = relative_error(p.grad, gradients[name])
    return {"loss": relative_error(part, loss), **errors}


@pytest.mark.multi_gpu
def test_two_gpus_equal_one(run_ranks):
    for errors in run_ranks(_two_ranks_and_one, 2, backend="nccl", timeout=240):
        # float32 through three tensor-core products of 2^-11 each (tf32x3) or exact, and sums in another order
        assert all(error < 1e-4 for error in errors.values()), max(errors.items(), key=lambda item: item[1])
