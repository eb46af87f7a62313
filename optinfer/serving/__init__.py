"""Lesson 6: a small serving engine where quantization, attention, the KV cache and speculation meet."""

from optinfer.serving.engine import Engine
from optinfer.serving.model_runner import ModelRunner
from optinfer.serving.output import UnknownRequest
from optinfer.serving.records import ChunkRecord, EngineStats, StepRecord
from optinfer.serving.request import Completion, Delta, Request, RequestMetrics, SamplingParams, Sequence
from optinfer.serving.router import Router
from optinfer.serving.scheduler import Schedule, ScheduledChunk, Scheduler
from optinfer.serving.split import prefill_and_decode, serve_in_parts
from optinfer.serving.traffic import Arrival, Promise, Rehearsal, Service, StepCost, arrival_times, knee, serve

__all__ = [
    "Arrival",
    "ChunkRecord",
    "Completion",
    "Delta",
    "Engine",
    "EngineStats",
    "ModelRunner",
    "Promise",
    "Rehearsal",
    "Request",
    "RequestMetrics",
    "Router",
    "SamplingParams",
    "Schedule",
    "ScheduledChunk",
    "Scheduler",
    "Sequence",
    "Service",
    "StepCost",
    "StepRecord",
    "UnknownRequest",
    "arrival_times",
    "knee",
    "prefill_and_decode",
    "serve",
    "serve_in_parts",
]
