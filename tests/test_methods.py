"""Every method: its start, its gradients, its randomness, its state, and the same numbers as PEFT's modules."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from foreword.config import PromptConfig
from foreword.errors import ForewordError
from foreword.prompts.methods.base import Method, Start
from foreword.prompts.methods.cpt import ContextAware, label_targets
from foreword.prompts.methods.low_rank import best_factors
from foreword.prompts.methods.multitask import Multitask, task_prompt
from foreword.prompts.methods.registry import METHODS, build

P, H, TASKS = 6, 8, 3
TYPES = (1, 2, 2, 3, 4, 0)
CASES = {
    "prompt-tuning": PromptConfig(method="prompt-tuning"),
    "p-tuning mlp": PromptConfig(method="p-tuning", encoder="mlp", encoder_size=5),
    "p-tuning lstm": PromptConfig(method="p-tuning", encoder="lstm", encoder_size=5),
    "residual": PromptConfig(method="residual", encoder_size=4),
    "low-rank": PromptConfig(method="low-rank", rank=3),
    "prefix-tuning": PromptConfig(method="prefix-tuning"),
    "prefix-tuning projection": PromptConfig(method="prefix-tuning", projection=True, encoder_size=4),
    "multitask": PromptConfig(method="multitask", rank=2),
    "cpt": PromptConfig(method="cpt"),
    "context-tuning": PromptConfig(method="context-tuning"),
    "cartridge": PromptConfig(method="cartridge", frozen_tokens=2),
}
DRAWING = [name for name in CASES if name.startswith(("p-tuning", "residual", "multitask")) or "projection" in name]
each = pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(tasks: int = 1, seed: int = 7) -> Start:
    values = torch.randn(P, H, generator=generator(seed)) * 0.1
    return Start(values, tasks=tasks, token_ids=(11, 12, 13, 14, 15, 16), token_types=TYPES)


def shaken(method: Method, seed: int = 3) -> Method:
    """The method with every parameter moved, so that no layer is 0 any more."""
    draw = generator(seed)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype) * 0.3)
    return method


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- all methods ---


@each
def test_shapes_types_and_names(config: PromptConfig) -> None:
    method = build(start(), config, generator())
    prompt = method.soft_prompt()
    assert method().shape == (P, H)
    assert prompt.values.shape == (P, H) and not prompt.values.requires_grad and prompt.kind == method.kind
    assert all(p.dtype == torch.float32 for p in (*method.parameters(), *method.buffers()))
    assert all(not t.requires_grad and t.dtype == torch.float32 for t in method.stored().values())


def test_kinds_and_peft_types() -> None:
    described = {name: (cls.kind, cls.peft_type) for name, cls in METHODS.items()}
    assert described == {
        "prompt-tuning": ("rows", "PROMPT_TUNING"),
        "p-tuning": ("rows", "P_TUNING"),
        "residual": ("rows", "PROMPT_TUNING"),
        "low-rank": ("rows", "PROMPT_TUNING"),
        "prefix-tuning": ("prefix", "PREFIX_TUNING"),
        "context-tuning": ("prefix", "PREFIX_TUNING"),
        "multitask": ("rows", "MULTITASK_PROMPT_TUNING"),
        "cpt": ("rows", "CPT"),
        "cartridge": ("prefix", "CARTRIDGE"),
    }


@pytest.mark.parametrize("name", ["prompt-tuning", "residual", "prefix-tuning", "context-tuning", "cpt", "cartridge"])
@pytest.mark.parametrize("projection", [False, True])
def test_first_output_is_the_start_itself(name: str, projection: bool) -> None:
    method = build(start(), PromptConfig(method=name, projection=projection), generator())
    assert torch.equal(method(), start().values)


@each
def test_start_is_left_alone(config: PromptConfig) -> None:
    given_start = start()
    method = build(given_start, config, generator())
    shaken(method)
    method.project()
    assert torch.equal(given_start.values, start().values)


@each
def test_gradients_agree_with_finite_differences(config: PromptConfig) -> None:
    method = shaken(build(start(tasks=2), config, generator())).double()
    names, parameters = zip(*method.named_parameters(), strict=True)

    def output(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(method, dict(zip(names, values, strict=True)), ())

    inputs = tuple(p.detach().clone().requires_grad_() for p in parameters)
    assert torch.autograd.gradcheck(output, inputs)


@each
def test_every_parameter_is_trained_within_two_steps(config: PromptConfig) -> None:
    method = build(start(), config, generator())
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    target = torch.randn(P, H, generator=generator(1))
    for _ in range(2):
        optimizer.zero_grad()
        (method() - target).square().sum().backward()
        optimizer.step()
    assert [name for name, p in method.named_parameters() if torch.equal(p, before[name])] == []


@each
def test_same_seed_same_method_whatever_the_global_generator(config: PromptConfig) -> None:
    torch.manual_seed(1)
    first = build(start(), config, generator(5)).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = build(start(), config, generator(5)).state_dict()
    assert same(first, second)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", DRAWING)
def test_another_seed_another_method(name: str) -> None:
    assert not same(*(build(start(), CASES[name], generator(seed)).state_dict() for seed in (0, 1)))


@each
def test_state_dict_is_all_that_a_resumed_run_needs(config: PromptConfig) -> None:
    trained = shaken(build(start(), config, generator(0)))
    fresh = build(start(seed=8), config, generator(1))
    fresh.load_state_dict(trained.state_dict())
    assert same(fresh.stored(), trained.stored())
    fresh.project()
    trained.project()
    assert torch.equal(fresh(), trained())


@each
def test_projection_never_looks_at_a_value(config: PromptConfig) -> None:
    # A tensor on the meta device has none: whatever would wait for the GPU fails here.
    build(start(), config, generator()).to("meta").project()


# --- registry ---


def test_unknown_method_names_the_key_and_the_nearest() -> None:
    with pytest.raises(ForewordError) as error:
        build(start(), PromptConfig(method="prefix-tunning"), generator())
    assert error.value.where == "key prompt.method" and "'prefix-tuning'" in error.value.fix
    with pytest.raises(ForewordError, match="known: prompt-tuning, p-tuning"):
        build(start(), PromptConfig(method="zzz"), generator())


def test_unknown_encoder() -> None:
    with pytest.raises(ForewordError, match=r"key prompt\.encoder"):
        build(start(), PromptConfig(method="p-tuning", encoder="gru"), generator())


# --- p-tuning ---


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_p_tuning_computes_what_pefts_encoder_does(kind: str) -> None:
    from peft import PromptEncoder, PromptEncoderConfig

    method = shaken(build(start(), PromptConfig(method="p-tuning", encoder=kind, encoder_size=5), generator()))
    settings = PromptEncoderConfig(
        num_virtual_tokens=P,
        token_dim=H,
        num_transformer_submodules=1,
        encoder_hidden_size=5,
        encoder_reparameterization_type=kind.upper(),
    )
    theirs = PromptEncoder(settings)
    renamed = {"embedding": "embedding.weight", "recurrent": "lstm_head", "head": "mlp_head"}
    state = {renamed[k.split(".")[0]] + k[len(k.split(".")[0]) :]: v for k, v in method.state_dict().items()}
    theirs.load_state_dict(state)
    torch.testing.assert_close(method(), theirs(torch.arange(P)[None])[0])


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_p_tuning_starts_at_the_size_of_what_it_is_given(kind: str, scale: float) -> None:
    values = start().values * scale
    method = build(Start(values), PromptConfig(method="p-tuning", encoder=kind), generator())
    torch.testing.assert_close(method().square().mean(), values.square().mean())


def test_p_tuning_from_zeros_is_finite() -> None:
    method = build(Start(torch.zeros(P, H)), PromptConfig(method="p-tuning"), generator())
    assert method().isfinite().all() and method().abs().max() > 0


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_fresh_layers_follow_torchs_distributions(kind: str) -> None:
    width = 48
    values = torch.randn(P, width, generator=generator())
    ours = build(Start(values), PromptConfig(method="p-tuning", encoder=kind), generator()).state_dict()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(width, width) if kind == "mlp" else nn.LSTM(width, width, 2, bidirectional=True)
    prefix = "head.0." if kind == "mlp" else "recurrent."
    for name, theirs in layer.state_dict().items():
        drawn = ours[prefix + name]
        assert drawn.shape == theirs.shape
        assert drawn.abs().max() <= width**-0.5
        if drawn.dim() > 1:
            torch.testing.assert_close(drawn.std(), theirs.std(), rtol=0.1, atol=0)


# --- residual ---


def test_residual_network_is_shared_over_tokens() -> None:
    values = torch.randn(1, H, generator=generator()).repeat(P, 1)
    method = build(Start(values), PromptConfig(method="residual", encoder_size=4), generator())
    with torch.no_grad():
        method.get_parameter("network.3.weight").fill_(0.5)
    rows = method()
    assert not torch.allclose(rows, values)
    torch.testing.assert_close(rows, rows[:1].repeat(P, 1))


# --- low-rank ---


@given(tokens=st.integers(1, 9), width=st.integers(1, 9), rank=st.integers(1, 12), seed=st.integers(0, 999))
def test_low_rank_start_is_the_best_approximation(tokens: int, width: int, rank: int, seed: int) -> None:
    values = torch.randn(tokens, width, generator=generator(seed))
    method = build(Start(values), PromptConfig(method="low-rank", rank=rank), generator())
    tail = torch.linalg.svdvals(values.double())[rank:]
    # Eckart and Young: no matrix of this rank is nearer than the singular values left out.
    torch.testing.assert_close((method().double() - values).norm(), tail.norm(), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in method.parameters()) == min(rank, tokens, width) * (tokens + width)


def test_low_rank_from_a_tiled_text_loses_no_rank() -> None:
    values = torch.randn(2, H, generator=generator()).repeat(3, 1)
    left, right = (factor.requires_grad_() for factor in best_factors(values, 5))
    torch.testing.assert_close(left @ right, values)
    (left @ right - torch.randn(P, H, generator=generator(1))).square().sum().backward()
    assert left.grad is not None and right.grad is not None
    alive = left.grad.norm(dim=0) + right.grad.norm(dim=1)
    assert (alive > 0.01).all()


def test_low_rank_from_zeros_can_move() -> None:
    left, right = best_factors(torch.zeros(P, H), 2)
    assert left.norm() > 0 and torch.equal(left @ right, torch.zeros(P, H))


# --- prefix tuning ---


def test_prefix_projection_adds_what_pefts_encoder_computes() -> None:
    from peft import PrefixEncoder, PrefixTuningConfig

    layers, size = 2, 4
    values = torch.randn(P, layers * 2 * size, generator=generator())
    config = PromptConfig(method="prefix-tuning", projection=True, encoder_size=size)
    method = shaken(build(Start(values), config, generator()))
    settings = PrefixTuningConfig(
        num_virtual_tokens=P, token_dim=size, num_layers=layers, encoder_hidden_size=size, prefix_projection=True
    )
    theirs = PrefixEncoder(settings)
    state = {k.removeprefix("projection."): v for k, v in method.state_dict().items() if k != "values"}
    state["embedding.weight"] = state.pop("embedding")
    theirs.load_state_dict(state)
    torch.testing.assert_close(method(), values + theirs(torch.arange(P)))


def test_prefix_projection_trains_the_network_alone() -> None:
    method = build(start(), CASES["prefix-tuning projection"], generator())
    assert all(name.startswith("projection.") for name, _ in method.named_parameters())
    assert list(method.stored()) == ["prompt_embeddings"]


# --- multitask ---


def test_multitask_computes_what_pefts_embedding_does() -> None:
    from peft import MultitaskPromptTuningConfig
    from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding

    method = shaken(build(start(TASKS), CASES["multitask"], generator()))
    settings = MultitaskPromptTuningConfig(
        num_virtual_tokens=P, token_dim=H, num_transformer_submodules=1, num_tasks=TASKS, num_ranks=2
    )
    theirs = MultitaskPromptEmbedding(settings, nn.Embedding(3, H))
    stored = method.stored()
    theirs.load_state_dict({"embedding.weight": stored["prompt_embeddings"]} | dict(list(stored.items())[1:]))
    prompts = theirs(torch.arange(P).repeat(TASKS, 1), torch.arange(TASKS))
    assert method().shape == (TASKS * P, H)
    for task in range(TASKS):
        torch.testing.assert_close(method()[task * P : (task + 1) * P], prompts[task])
        torch.testing.assert_close(task_prompt(stored, task), prompts[task])


@pytest.mark.parametrize("rank", [1, 8])
def test_multitask_starts_near_the_rows_in_every_task(rank: int) -> None:
    method = build(start(TASKS), PromptConfig(method="multitask", rank=rank), generator())
    expected = start().values.repeat(TASKS, 1)
    torch.testing.assert_close(method(), expected, rtol=0.02, atol=0)
    assert torch.equal(method(), expected) == (rank == 1)


@pytest.mark.parametrize(("source", "tasks"), [(3, 3), (3, 1), (1, 3), (2, 3)])
def test_multitask_takes_the_factors_of_a_source(source: int, tasks: int) -> None:
    columns = torch.randn(source, P, 4, generator=generator(1))
    rows = torch.randn(source, 4, H, generator=generator(2))
    given_start = dataclasses.replace(start(tasks), factors=(columns, rows))
    method = build(given_start, PromptConfig(method="multitask", rank=2), generator())
    assert isinstance(method, Multitask)
    if source == tasks:
        assert torch.equal(method.columns, columns) and torch.equal(method.rows, rows)
        assert method.columns.data_ptr() != columns.data_ptr()
    else:
        assert torch.equal(method.columns, columns.mean(0).expand(tasks, -1, -1))
        assert torch.equal(method.rows, rows.mean(0).expand(tasks, -1, -1))


# --- context-aware prompt tuning ---


def context_aware(types: tuple[int, ...], delta: torch.Tensor, epsilon: float, format_epsilon: float) -> ContextAware:
    given_start = Start(torch.zeros_like(delta), token_ids=tuple(range(len(types))), token_types=types)
    config = PromptConfig(method="cpt", epsilon=epsilon, format_epsilon=format_epsilon)
    method = build(given_start, config, generator())
    assert isinstance(method, ContextAware)
    with torch.no_grad():
        method.delta.copy_(delta)
    return method


token_types = st.lists(st.integers(0, 12), min_size=1, max_size=9).map(tuple)
sizes = st.floats(0.01, 2.0)


@given(types=token_types, epsilon=sizes, format_epsilon=sizes, scale=sizes, seed=st.integers(0, 999))
def test_cpt_projects_as_peft_does(
    types: tuple[int, ...], epsilon: float, format_epsilon: float, scale: float, seed: int
) -> None:
    from peft import CPTConfig, CPTEmbedding

    delta = torch.randn(len(types), H, generator=generator(seed)) * scale * 0.05
    delta[0] = 0
    method = context_aware(types, delta, epsilon, format_epsilon)
    settings = CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=[0] * len(types),
        cpt_tokens_type_mask=list(types),
        opt_projection_epsilon=epsilon,
        opt_projection_format_epsilon=format_epsilon,
    )
    settings.token_dim = H
    theirs = CPTEmbedding(settings, nn.Embedding(1, H))
    theirs.delta_embedding.weight.data = delta
    method.project()
    torch.testing.assert_close(method.delta.detach(), theirs.get_projection(), rtol=1e-5, atol=1e-9)


@given(types=token_types, epsilon=sizes, format_epsilon=sizes, scale=sizes, seed=st.integers(0, 999))
def test_cpt_changes_stay_in_their_balls(
    types: tuple[int, ...], epsilon: float, format_epsilon: float, scale: float, seed: int
) -> None:
    delta = torch.randn(len(types), H, generator=generator(seed)) * scale * 0.05
    method = context_aware(types, delta, epsilon, format_epsilon)
    method.project()
    once = method.delta.detach().clone()
    radius = method.radius.flatten()
    inside = delta.norm(dim=1) < radius
    assert (once.norm(dim=1) <= radius * 1.00001).all()
    assert torch.equal(once[inside], delta[inside])
    assert all(not once[i].any() for i, kind in enumerate(types) if kind % 4 == 0)
    method.project()
    torch.testing.assert_close(method.delta.detach(), once)


def test_cpt_labels_have_no_gradient() -> None:
    method = build(start(), CASES["cpt"], generator())
    method().sum().backward()
    gradient = method.get_parameter("delta").grad
    assert gradient is not None
    assert gradient.any(dim=1).tolist() == [True, True, True, True, False, False]


def test_label_targets_by_hand() -> None:
    #        template input label . template input label label
    types = (4, 1, 2, 4, 0, 5, 6, 8, 8)
    assert label_targets(range(100, 109), types, 0.5) == [(2, 103, 0.5), (6, 107, 1.0), (7, 108, 1.0)]
    assert label_targets((1, 2), (1, 2), 0.5) == []


@given(types=token_types, decay=st.floats(0.1, 1.0), seed=st.integers(0, 999), query=st.booleans())
def test_label_weights_are_those_of_pefts_loss(types: tuple[int, ...], decay: float, seed: int, query: bool) -> None:
    from peft import CPTEmbedding

    vocabulary = 5
    draw = generator(seed)
    ids = torch.randint(vocabulary, (len(types) + 2,), generator=draw)
    targets = label_targets(ids[: len(types)].tolist(), types, decay)
    whole = types
    if query:
        # A training row follows: its label is PEFT's last, and those of the context come before it.
        whole = (*types, 0, max(types) // 4 * 4 + 4)
        targets = [(row, token, weight * decay) for row, token, weight in targets]
        targets.append((len(types), int(ids[-1]), 1.0))
    assume(targets)
    kinds = torch.tensor(whole)
    labels = torch.where((kinds > 0) & (kinds % 4 == 0), ids[: len(whole)], -100)
    logits = torch.randn(1, len(whole), vocabulary, generator=draw, requires_grad=True)
    settings = SimpleNamespace(opt_loss_decay_factor=decay, opt_weighted_loss_type="decay")
    theirs = CPTEmbedding.calculate_loss(SimpleNamespace(logits=logits), labels[None], kinds[None], settings).loss
    surprise = -logits[0].log_softmax(-1)
    ours = torch.stack([surprise[row, token] * weight for row, token, weight in targets]).mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)))


# --- cartridge ---


@pytest.mark.parametrize("frozen", [0, 1, 5])
def test_cartridge_keeps_its_first_tokens(frozen: int) -> None:
    method = shaken(build(start(), PromptConfig(method="cartridge", frozen_tokens=frozen), generator()))
    moved = (method() != start().values).any(dim=1).tolist()
    assert moved == [i >= frozen for i in range(P)]
    assert [tuple(p.shape) for p in method.parameters()] == [(P - frozen, H)]


@pytest.mark.parametrize("frozen", [-1, P, P + 1])
def test_cartridge_with_nothing_to_train_is_refused(frozen: int) -> None:
    with pytest.raises(ForewordError, match=r"key prompt\.frozen_tokens"):
        build(start(), PromptConfig(method="cartridge", frozen_tokens=frozen), generator())
