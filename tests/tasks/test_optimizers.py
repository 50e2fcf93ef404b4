"""The optimizers know the parameters of every family: what is decayed, and what Muon orthogonalises."""

import dataclasses
import sys
from pathlib import Path

import jax
import pytest
from optax.contrib import MuonDimensionNumbers

from lm import tree
from lm.models.transformer import Transformer
from lm.optim import DECAY, MUON, OptimConfig, make_optimizer, make_schedule
from lm.sharding import MeshConfig, make_mesh
from lm.train import abstract_params

sys.path.insert(0, str(Path(__file__).parents[1]))
from tasks.families import FAMILIES

# By the last names of a path: which axes are a matrix's input and output, None where it is no matrix of Muon's.
IN_AND_OUT = {
    ("query", "kernel"): (-3, (-2, -1)),
    ("key", "kernel"): (-3, (-2, -1)),
    ("value", "kernel"): (-3, (-2, -1)),
    ("out", "kernel"): ((-3, -2), -1),
    ("up", "kernel"): (-2, -1),
    ("gate", "kernel"): (-2, -1),
    ("down", "kernel"): (-2, -1),
    ("dense", "kernel"): (-2, -1),
    ("pooler", "kernel"): (-2, -1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_has_its_rule(family: str) -> None:
    heads = {"n_classes": 3, "span_head": True} if family == "bert" else {}
    apart = {"share_embeddings": False} if FAMILIES[family].encoder_layers else {}
    config = dataclasses.replace(FAMILIES[family], vocab_size=128, **heads, **apart)
    params, _ = abstract_params(Transformer(config), make_mesh(MeshConfig(devices=1)))
    decayed = dict(tree.path_leaves(tree.match_patterns(params, DECAY)))
    # As text: the axes are a tuple, which a tree would take for a branch.
    muon = dict(tree.path_leaves(tree.match_patterns(params, [(pattern, repr(axes)) for pattern, axes in MUON])))
    for path, leaf in tree.path_leaves(params):
        names = tuple(path.split("/"))
        assert decayed[path] == (names[-1] == "kernel"), path
        expected = IN_AND_OUT.get(names[-2:])
        assert muon[path] == repr(expected and MuonDimensionNumbers(*expected)), path
        assert expected is None or leaf.ndim >= 2
    for optimizer in ("adamw", "muon"):
        settings = OptimConfig(optimizer=optimizer)
        jax.eval_shape(make_optimizer(settings, make_schedule(settings, 10), params).init, params)
