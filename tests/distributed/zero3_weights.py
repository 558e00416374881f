"""Weights loaded into an engine, permanently or for an evaluation."""

from __future__ import annotations

import torch

from tests.distributed.zero3_harness import (
    Ranks,
    micro_batches,
    output_of,
    plain_unet,
    random_weights,
)


def check_weights_loaded_between_steps_are_used(ranks: Ranks) -> None:
    engine, batch = ranks.shared_engine(), micro_batches(7, 1)[0][0]
    ranks.train(engine, range(1))
    weights = random_weights(seed=1)
    assert engine.load_full(weights.items()) == []
    with torch.no_grad():
        torch.testing.assert_close(output_of(engine, batch), output_of(plain_unet(weights), batch))
    without_last = list(random_weights(seed=2).items())[:-1]
    assert engine.load_full(without_last) == list(weights)[-1:]


def check_weights_lent_to_the_engine_are_taken_back(ranks: Ranks) -> None:
    for precision in ("fp32", "bf16"):
        engine, batch = ranks.shared_engine(precision), micro_batches(7, 1)[0][0]
        ranks.train(engine, range(1))
        own = {name: shard.clone() for name, shard in engine.local_shards().items()}
        with torch.no_grad():
            before = output_of(engine, batch)
            with engine.weights({name: 0.5 * shard for name, shard in own.items()}):
                during = output_of(engine, batch)
            after = output_of(engine, batch)
        halved = plain_unet({name: 0.5 * engine.gather(name, shard) for name, shard in own.items()})
        with torch.no_grad():
            wanted = output_of(halved.to(before.dtype), batch)
        torch.testing.assert_close(during, wanted)
        assert torch.equal(before, after)
        assert all(torch.equal(shard, own[name]) for name, shard in engine.local_shards().items())
        ranks.train(engine, range(1))


def check_wrong_weights_are_refused(ranks: Ranks) -> None:
    engine = ranks.shared_engine()
    name, tensor = next(iter(random_weights().items()))
    for stream, words in (
        ([("no.such.weight", tensor)], ["no.such.weight"]),
        ([(name, torch.zeros(3, 1))], [name, "(3, 1)", str(tuple(tensor.shape))]),
    ):
        try:
            engine.load_full(stream)
        except ValueError as error:
            assert all(word in str(error) for word in words), error
        else:
            raise AssertionError("not refused")
