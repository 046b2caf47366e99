"""What a step must compute at least, which is what model-FLOPs utilisation is a share of."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ichigo_jax.models.attention import MASKED_SCOPE
from ichigo_jax.models.declare import Buffer
from ichigo_jax.parallel.chips import chip_of
from ichigo_jax.tasks import Task, planned_task
from ichigo_jax.training.flops import count_flops
from ichigo_jax.training.run_config import RunConfig
from ichigo_jax.training.state import split
from ichigo_jax.training.watch import StepWork


def step_work(task: Task, config: RunConfig, mesh: Mesh) -> StepWork:
    """What a step of the run does on the mesh; call it outside of ``jax.set_mesh``."""
    chip = chip_of(mesh.devices.flat[0])
    known = (None, None) if chip is None else (model_flops(config), chip.flops)
    return StepWork(task.tokens_per_step(), mesh.size, *known)


def model_flops(config: RunConfig) -> float:
    """Model FLOPs of one step of the whole batch, over all devices together (as PaLM, https://arxiv.org/abs/2204.02311, App. B).

    Counted from the traced loss and its gradient:

    - matrix products and convolutions alone, a multiply-add as two;
    - without rematerialisation, however ``train.remat`` is set: what is computed anew does not count;
    - causal attention as half of all pairs of a row, whether or not several segments share the row, and whatever
      ``train.attention`` computes of it;
    - a gradient only where something is trained: a frozen layer below all trained ones counts its forward pass alone. A language
      model's head is the exception: its gradient is made with the loss, and counts even where the head is frozen;
    - padding, of rows and of the vocabulary, as any other token; the optimizer not at all.

    Call it outside of ``jax.set_mesh``. Takes the time of tracing the step, and no memory.
    """
    train = dataclasses.replace(config.train, remat="none", attention="xla", accumulation=1)
    task = planned_task(dataclasses.replace(config, train=train))
    model = nnx.eval_shape(lambda: task.make_model(nnx.Rngs(0)))
    graphdef, *parts = split(model, config.optimizer.frozen)

    def gradient(params, frozen, buffers, batch):
        def loss(params):
            model = nnx.merge(graphdef, params, frozen, buffers)
            value, metrics = task.loss(model, batch, task.totals(batch), jax.random.key(0))
            return value.astype(jnp.float32), (metrics, nnx.to_pure_dict(nnx.state(model, Buffer)))

        return jax.value_and_grad(loss, has_aux=True)(params)

    return count_flops(gradient, *parts, task.batch_shapes(), halved=MASKED_SCOPE)
