"""elman.layers against torch.nn: the same results, gradients, random numbers and files, for all options."""

from __future__ import annotations

import copy
import io
import pickle
import random
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from elman import layers

KINDS = {"RNN": (nn.RNN, layers.RNN), "LSTM": (nn.LSTM, layers.LSTM), "GRU": (nn.GRU, layers.GRU)}
FORMS = ("padded", "unbatched", "sorted", "unsorted", "lengths")
TOLERANCE = 1e-10


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Configuration:
    """One way to build and call a layer."""

    kind: str
    input_size: int
    hidden_size: int
    num_layers: int
    bidirectional: bool
    bias: bool
    batch_first: bool
    proj_size: int
    nonlinearity: str
    dropout: float
    form: str
    initial: bool
    training: bool
    steps: int
    batch: int
    frozen: bool
    """Whether weights and input need no gradient."""

    def options(self) -> dict[str, Any]:
        given = asdict(self)
        names = ["input_size", "hidden_size", "num_layers", "bidirectional", "bias", "batch_first", "dropout"]
        names += {"RNN": ["nonlinearity"], "LSTM": ["proj_size"], "GRU": []}[self.kind]
        return {name: given[name] for name in names} | {"dtype": torch.float64}

    def __str__(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())


def draw(rng: random.Random) -> Configuration:
    kind = rng.choice(sorted(KINDS))
    num_layers = rng.choice((1, 1, 2, 3))
    input_size, hidden_size = rng.choice(((4, 2), (4, 2), (4, 2), (2, 1)))
    form = rng.choice(FORMS)
    return Configuration(
        kind=kind,
        input_size=input_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        bidirectional=rng.random() < 0.5,
        bias=rng.random() < 0.7,
        batch_first=rng.random() < 0.5,
        proj_size=1 if kind == "LSTM" and hidden_size > 1 and rng.random() < 0.5 else 0,
        nonlinearity=rng.choice(("tanh", "relu")) if kind == "RNN" else "tanh",
        dropout=rng.choice((0.0, 0.4, 0.4, 1.0)) if num_layers > 1 else 0.0,
        form=form,
        initial=rng.random() < 0.5,
        training=rng.random() < 0.6,
        steps=rng.choice((1, 2, 3, 6)),
        batch=1 if form == "unbatched" else rng.choice((1, 2, 3, 5)),
        frozen=rng.random() < 0.1,
    )


def sample(count: int, seed: int) -> list[Configuration]:
    rng = random.Random(seed)
    found: dict[Configuration, None] = {}
    while len(found) < count:
        found[draw(rng)] = None
    return list(found)


CONFIGURATIONS = sample(400, seed=10)


def build(configuration: Configuration) -> tuple[nn.Module, nn.Module]:
    """torch.nn's layer and ours, drawn from the same seed."""
    pair = []
    for kind in KINDS[configuration.kind]:
        torch.manual_seed(7)
        layer = kind(**configuration.options()).train(configuration.training)
        pair.append(layer.requires_grad_(not configuration.frozen))
    return pair[0], pair[1]


def inputs(c: Configuration) -> tuple[Tensor, Any, list[int]]:
    """The padded input (T, B, D), the initial state or None, and the lengths."""
    grad = not c.frozen
    xs = torch.randn(c.steps, c.batch, c.input_size, dtype=torch.float64, requires_grad=grad)
    count, out = c.num_layers * (1 + c.bidirectional), c.proj_size or c.hidden_size
    sizes = (out, c.hidden_size) if c.kind == "LSTM" else (out,)
    state = tuple(torch.randn(count, c.batch, n, dtype=torch.float64, requires_grad=grad) for n in sizes)
    lengths = [1 + (c.steps - 1 + 2 * i) % c.steps for i in range(c.batch)]
    if c.form == "sorted":
        lengths.sort(reverse=True)
    if c.form == "padded":
        lengths = [c.steps] * c.batch
    return xs, (state if c.kind == "LSTM" else state[0]) if c.initial else None, lengths


def call(layer: nn.Module, c: Configuration, xs: Tensor, state: Any, lengths: list[int]) -> list[Tensor]:
    """The output, packed or padded as ``c.form`` says, and the leaves of the final state."""
    if c.form == "unbatched":
        state = tuple(s[:, 0] for s in state) if isinstance(state, tuple) else state[:, 0] if c.initial else None
        given: Any = xs[:, 0]
    else:
        given = xs.transpose(0, 1) if c.batch_first else xs
    by_length = c.form == "lengths" and type(layer) in (layers.RNN, layers.LSTM, layers.GRU)
    if c.form in ("sorted", "unsorted") or (c.form == "lengths" and not by_length):
        given = pack_padded_sequence(given, lengths, c.batch_first, enforce_sorted=c.form == "sorted")
    torch.manual_seed(3)
    ys, final = layer(given, state, lengths=lengths) if by_length else layer(given, state)
    if c.form == "lengths":  # torch.nn has no such keyword: packed there, padded here
        if by_length:
            ys = pack_padded_sequence(ys, lengths, c.batch_first, enforce_sorted=False)
        return [ys.data, *(final if isinstance(final, tuple) else [final])]
    if isinstance(ys, PackedSequence):
        assert given.batch_sizes.equal(ys.batch_sizes)
        assert ys.sorted_indices is given.sorted_indices
        assert ys.unsorted_indices is given.unsorted_indices
        ys = ys.data
    return [ys, *(final if isinstance(final, tuple) else [final])]


def loss(results: list[Tensor]) -> Tensor:
    """Every element of every result counts, each with a weight of its own."""
    torch.manual_seed(5)
    return torch.stack([(result * torch.randn_like(result)).sum() for result in results]).sum()


def compare(c: Configuration) -> None:
    theirs, mine = build(c)
    xs, state, lengths = inputs(c)
    leaves = [] if state is None else list(state) if isinstance(state, tuple) else [state]
    results = [call(layer, c, xs, state, lengths) for layer in (theirs, mine)]
    for left, right in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(left, right, rtol=TOLERANCE, atol=TOLERANCE)
    if c.frozen:
        assert not any(result.requires_grad for result in results[1])
        return
    gradients = []
    for layer, result in zip((theirs, mine), results, strict=True):
        gradients.append(torch.autograd.grad(loss(result), [xs, *leaves, *layer.parameters()]))
    names = [
        "xs",
        *(f"state {i}" for i in range(len(leaves))),
        *(name for name, _ in theirs.named_parameters()),
    ]
    for name, right, left in zip(names, *gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_the_swap_changes_nothing(configuration: Configuration) -> None:
    compare(configuration)


@pytest.mark.slow
def test_the_swap_changes_nothing_in_thousands_of_configurations() -> None:
    for configuration in sample(4000, seed=11):
        compare(configuration)


def test_the_sample_covers_every_option(record_property: Callable[[str, object], None]) -> None:
    record_property("configurations", len(CONFIGURATIONS))
    print(f"{len(CONFIGURATIONS)} configurations")
    assert len(set(CONFIGURATIONS)) == len(CONFIGURATIONS) >= 400
    for kind in KINDS:
        for form in FORMS:
            for bidirectional in (False, True):
                assert any((c.kind, c.form, c.bidirectional) == (kind, form, bidirectional) for c in CONFIGURATIONS)
    for name in Configuration.__dataclass_fields__:
        values = [getattr(c, name) for c in CONFIGURATIONS]
        assert all(values.count(value) >= 10 for value in set(values)), name


def small(kind: str, ours: bool, **options: Any) -> nn.Module:
    torch.manual_seed(7)
    return KINDS[kind][ours](4, 2, **{"dtype": torch.float64, **options})


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def same(mine: Any, theirs: Any) -> None:
    torch.testing.assert_close(mine, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_weights_same_names_same_text(kind: str) -> None:
    options = {"num_layers": 2, "bidirectional": True} | ({"proj_size": 1} if kind == "LSTM" else {})
    theirs, mine = small(kind, False, **options), small(kind, True, **options)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert all(a.equal(b) for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert repr(mine) == repr(theirs)
    assert isinstance(mine, type(theirs))
    assert [name for name, _ in mine.named_modules()] == [""]
    mine(numbers(3, 2, 4))
    assert [name for name, _ in mine.named_modules()] == [""]
    assert list(mine.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_travel_both_ways(kind: str) -> None:
    theirs, mine = small(kind, False, num_layers=2), small(kind, True, num_layers=2)
    xs = numbers(3, 2, 4)
    for source, target in ((theirs, mine), (mine, theirs)):
        nn.init.normal_(source.weight_ih_l1)
        assert not source.weight_ih_l1.equal(target.weight_ih_l1)
        target.load_state_dict(source.state_dict())
        same(target(xs), source(xs))


class Tagger(nn.Module):
    """Someone's model: it takes whichever layers it is given."""

    def __init__(self, package: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.recurrent = package.LSTM(4, 2, num_layers=2, bidirectional=True, batch_first=True, dropout=0.3)
        self.output = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        self.recurrent.flatten_parameters()
        ys, (h, _) = self.recurrent(self.embedding(tokens))
        return self.output(ys) + h[-1].sum()


def test_a_model_is_swapped_by_its_import() -> None:
    theirs, mine = Tagger(nn).double(), Tagger(layers).double()
    mine.load_state_dict(theirs.state_dict())
    optimisers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in (theirs, mine)]
    tokens = torch.randint(11, (3, 5))
    for step in range(5):
        losses = []
        for model, optimiser in zip((theirs, mine), optimisers, strict=True):
            torch.manual_seed(step)
            optimiser.zero_grad()
            losses.append(nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten() % 3))
            losses[-1].backward()
            optimiser.step()
        same(losses[1], losses[0])
    same(mine.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_answer_alike(kind: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    mine, xs = small(kind, True), numbers(3, 2, 4)
    expected = mine(xs)
    twin = duplicate(mine)
    same(twin(xs), expected)
    with torch.no_grad():
        twin.weight_hh_l0.zero_()
    same(mine(xs), expected)
    assert not twin(xs)[0].equal(expected[0])


def test_a_whole_layer_is_saved_and_loaded() -> None:
    mine, xs, file = small("LSTM", True), numbers(3, 2, 4), io.BytesIO()
    torch.save(mine.state_dict(), file)
    file.seek(0)
    fresh = layers.LSTM(4, 2, dtype=torch.float64)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    same(fresh(xs), mine(xs))


def hook_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch asks for the parametrization, which is next
        nn.utils.weight_norm(layer, "weight_hh_l0")


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm, hook": hook_weight_norm,
    "weight_norm": lambda layer: parametrizations.weight_norm(layer, "weight_hh_l0"),
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer, "weight_hh_l0"),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer, "weight_ih_l1"),
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight_ih_l0", amount=0.5),
    "pruning, then for good": lambda layer: prune.remove(
        prune.l1_unstructured(layer, "weight_ih_l0", amount=0.5), "weight_ih_l0"
    ),
    "float": lambda layer: layer.float().double(),
    "replaced": lambda layer: setattr(layer, "weight_hh_l1", nn.Parameter(torch.ones_like(layer.weight_hh_l1))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_the_ones_used(kind: str, change: str) -> None:
    xs, results = numbers(3, 2, 4), []
    for ours in (False, True):
        layer = small(kind, ours, num_layers=2)
        torch.manual_seed(11)
        CHANGES[change](layer)
        optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
        outputs = []
        for _ in range(3):
            optimiser.zero_grad()
            ys, final = layer(xs)
            outputs.append((ys, final))
            loss([ys]).backward()
            optimiser.step()
        results.append((outputs, layer.state_dict()))
    same(results[1], results[0])
    assert not results[1][0][0][0].equal(results[1][0][2][0])


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_puts_other_weights_in_place(kind: str) -> None:
    xs, results = numbers(3, 2, 4), []
    for ours in (False, True):
        layer = small(kind, ours)
        other = {name: (value * 2).detach().requires_grad_() for name, value in layer.named_parameters()}
        ys, _ = torch.func.functional_call(layer, other, (xs,))
        results.append((ys, torch.autograd.grad(loss([ys]), list(other.values()))))
        results[-1] += (layer(xs)[0],)
    same(results[1], results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_two_threads_do_not_mix_their_weights(kind: str) -> None:
    pair = [small(kind, True), small(kind, True)]
    nn.init.ones_(pair[1].weight_hh_l0)
    xs = numbers(8, 2, 4)
    expected, wrong = [layer(xs)[0] for layer in pair], []

    def work(index: int) -> None:
        for _ in range(20):
            if not torch.allclose(pair[index](xs)[0], expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_padding_is_never_read(kind: str, batch_first: bool) -> None:
    """With lengths, NaN in the padding reaches no result and no gradient, and sequences may be empty."""
    mine = small(kind, True, num_layers=2, bidirectional=True, batch_first=batch_first)
    xs, lengths = numbers(5, 3, 4), torch.tensor([2, 0, 5])
    padding = torch.arange(5).unsqueeze(1) >= lengths
    given = xs.masked_fill(padding.unsqueeze(-1), torch.nan).requires_grad_()
    ys, final = mine(given.transpose(0, 1) if batch_first else given, lengths=lengths)
    ys = ys.transpose(0, 1) if batch_first else ys
    assert ys.shape == (5, 3, 4)
    assert not ys[padding].any()
    finals = final if isinstance(final, tuple) else (final,)
    assert not any(leaf[:, 1].any() for leaf in finals)
    loss([ys, *finals]).backward()
    assert not given.grad[padding].any()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in mine.parameters())
    for index in (0, 2):
        alone = xs[: lengths[index], index : index + 1]
        expected, last = mine(alone.transpose(0, 1) if batch_first else alone)
        same(ys[: lengths[index], index], expected.flatten(0, 1))
        for leaf, own in zip(finals, last if isinstance(last, tuple) else (last,), strict=True):
            same(leaf[:, index], own[:, 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_layout_in_memory(kind: str, batch_first: bool) -> None:
    theirs, mine = (small(kind, ours, batch_first=batch_first)(numbers(5, 3, 4))[0] for ours in (False, True))
    assert mine.stride() == theirs.stride()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_none(kind: str) -> None:
    for theirs, mine in zip(*(small(kind, ours)(numbers(5, 0, 4)) for ours in (False, True)), strict=True):
        same(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_autocast_answers_in_torchs_dtypes(kind: str, given: torch.dtype) -> None:
    results = []
    xs = numbers(6, 3, 4).to(given)
    for ours in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ys, final = small(kind, ours, num_layers=2, dtype=torch.float32)(xs)
        results.append([ys, *(final if isinstance(final, tuple) else [final])])
    for mine, theirs in zip(results[1], results[0], strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=0.02, atol=0.02)  # 8 bits of mantissa


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(kind: str, dtype: torch.dtype) -> None:
    xs = numbers(6, 3, 4).to(dtype)
    theirs, mine = (small(kind, ours, dtype=dtype)(xs)[0] for ours in (False, True))
    bits = torch.finfo(dtype).eps * 4
    assert mine.dtype == dtype
    torch.testing.assert_close(mine, theirs, rtol=bits, atol=bits)


def test_a_wider_cell_state_is_kept() -> None:
    """torch.nn.LSTM in bfloat16 carries a float32 cell state on; one in float64 takes a narrower one."""
    for dtype, s in ((torch.bfloat16, torch.float32), (torch.float64, torch.float32)):
        state = torch.zeros(1, 2, 2, dtype=dtype), torch.ones(1, 2, 2, dtype=s)
        xs = numbers(3, 2, 4).to(dtype)
        theirs, mine = (small("LSTM", ours, dtype=dtype)(xs, state) for ours in (False, True))
        assert [leaf.dtype for leaf in mine[1]] == [leaf.dtype for leaf in theirs[1]]
        torch.testing.assert_close(mine[0], theirs[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind: str) -> None:
    mine = small(kind, True)
    xs = numbers(3, 2, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda given: mine(given)[0], (xs,))


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_under_torch_compile(kind: str) -> None:
    """Dynamo leaves recurrent layers, torch.nn's and these alike, out of a graph unless told otherwise."""
    theirs, mine = (small(kind, ours, num_layers=2, bidirectional=True) for ours in (False, True))
    mine = pickle.loads(pickle.dumps(mine))
    xs = numbers(3, 2, 4).requires_grad_()
    with torch._dynamo.config.patch(allow_rnn=True):
        whole = torch.compile(mine, fullgraph=True, backend="aot_eager")(xs)
    same(whole, theirs(xs))
    gradients = [
        torch.autograd.grad(loss([ys]), [xs, *layer.parameters()])
        for ys, layer in ((whole[0], mine), (theirs(xs)[0], theirs))
    ]
    same(*gradients)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_breaks_around_a_layer_as_around_torchs(kind: str) -> None:
    xs, graphs = numbers(3, 2, 4), {}
    for ours in (False, True):
        layer, seen = small(kind, ours), graphs.setdefault(ours, [])

        def backend(graph: torch.fx.GraphModule, _: Any, seen: list[Any] = seen) -> Any:
            seen.append([str(node.target) for node in graph.graph.nodes])
            return graph.forward

        def model(xs: Tensor, layer: nn.Module = layer) -> Tensor:
            return layer(xs.sin())[0].cos()

        same(torch.compile(model, backend=backend)(xs), model(xs))
        torch._dynamo.reset()
    assert graphs[True] == graphs[False]  # nothing of what stands behind the layer is in a graph of its own
