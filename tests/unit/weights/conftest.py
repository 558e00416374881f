"""Fixtures of the networks: the public UNets as references."""

from tests.reference_unets import *  # noqa: F403
