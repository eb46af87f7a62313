"""Lesson 6: a small serving engine where quantization, attention, the KV cache and speculation meet."""

from optinfer.serving.engine import Engine, EngineStats, StepRecord, UnknownRequest
from optinfer.serving.model_runner import ModelRunner
from optinfer.serving.request import Completion, Delta, Request, RequestMetrics, SamplingParams, Sequence
from optinfer.serving.scheduler import Schedule, ScheduledChunk, Scheduler

__all__ = [
    "Completion",
    "Delta",
    "Engine",
    "EngineStats",
    "ModelRunner",
    "Request",
    "RequestMetrics",
    "SamplingParams",
    "Schedule",
    "ScheduledChunk",
    "Scheduler",
    "Sequence",
    "StepRecord",
    "UnknownRequest",
]
