"""The compiled loop: choose the tokens to read, pass them through the model, draw the next.

Letters: L window, V vocabulary.
"""

from __future__ import annotations

from mygpt.engines.cpu import layout as at
from mygpt.engines.cpu.arithmetic import part_start
from mygpt.engines.cpu.forward import barrier, forward
from mygpt.engines.cpu.sample import argmax, choose
from mygpt.engines.cpu.simd import INT64, INTS, floats, int8s, ints, kernel, skip


@kernel(INTS, INT64)
def _move_window(slot, window):
    """What `Window.start` does; a window that moved is read anew."""
    length, start = slot[at.LENGTH], slot[at.START]
    if start < 0 or slot[at.OVERFLOW] == at.CROP:
        start = max(0, length - window)
    elif length - start > window:
        start = length - max(1, window // 2)
    if start != slot[at.START]:
        slot[at.START] = start
        slot[at.CACHED] = 0


@kernel(INTS, INT64, INT64, INTS)
def _plan_slot(job, step, number, slot):
    start, cached, first = slot[at.START], slot[at.CACHED], job[at.NUM_ROWS]
    wanted = slot[at.LENGTH] - start - cached
    if job[at.MODE] == at.PREFILL:
        wanted -= 1  # the last token is read when its prediction is asked for
    elif wanted == 0:  # it was weighed, and nothing was taken: its prediction is asked for again
        cached, wanted = cached - 1, 1
        slot[at.CACHED] = cached
    rows = max(0, min(wanted, job[at.MAX_ROWS] - first))
    text = skip(ints(job[at.TEXT]), number * job[at.TEXT_STRIDE] + start + cached)
    for i in range(rows):
        ints(job[at.ROW_SLOT])[first + i] = number
        ints(job[at.ROW_POSITION])[first + i] = cached + i
        ints(job[at.ROW_TOKEN])[first + i] = text[i]
    slot[at.CACHED] += rows
    job[at.NUM_ROWS] = first + rows
    if rows == wanted and job[at.MODE] != at.PREFILL:
        output = job[at.OUTPUTS]
        ints(job[at.OUTPUT_SLOT])[output] = number
        ints(job[at.OUTPUT_ROW])[output] = first + rows - 1
        ints(job[at.OUTPUT_POSITION])[output] = cached + rows - 1
        slot[at.LOGITS_ROW] = job[at.OUTPUTS_BEFORE] + output
        slot[at.STEPS_DONE] = step + 1
        job[at.OUTPUTS] = output + 1


@kernel(INTS, INT64)
def _plan(job, step):
    """List the rows to read next: of each slot whose turn it is, as many as there is room for."""
    job[at.OUTPUTS_BEFORE] += job[at.OUTPUTS]
    job[at.NUM_ROWS] = 0
    job[at.OUTPUTS] = 0
    for number in range(job[at.SLOTS]):
        slot = skip(ints(job[at.SLOT_TABLE]), number * at.SLOT_SIZE)
        if (
            slot[at.STATUS] == at.ACTIVE
            and slot[at.STEPS_DONE] <= step
            and job[at.NUM_ROWS] < job[at.MAX_ROWS]
        ):
            _move_window(slot, job[at.WINDOW])
            _plan_slot(job, step, number, slot)


@kernel(INTS, INT64, INTS, INT64)
def _append(job, number, slot, token):
    ints(job[at.TEXT])[number * job[at.TEXT_STRIDE] + slot[at.LENGTH]] = token
    mark = skip(int8s(job[at.SEEN]), number * job[at.VOCAB] + token)
    ends = mark[0] & at.ENDS
    mark[0] |= at.OCCURRED
    slot[at.LENGTH] += 1
    slot[at.DRAWN] += 1
    if ends or slot[at.DRAWN] >= slot[at.LIMIT]:
        slot[at.STATUS] = at.ENDED
        # Later steps of other slots reuse the row of logits; a slot that ended keeps its own
        # where nobody weighs any more.
        kept = skip(floats(job[at.PROBABILITIES]), number * job[at.VOCAB_STRIDE])
        logits = skip(floats(job[at.LOGITS]), slot[at.LOGITS_ROW] * job[at.VOCAB_STRIDE])
        for i in range(job[at.VOCAB]):
            kept[i] = logits[i]
        slot[at.LOGITS_ROW] = -1


@kernel(INTS)
def _take(job):
    """Append to each active slot the token with the largest probability / noise.

    With noise drawn from Exp(1) this draws from the probabilities: it is how torch.multinomial
    draws one token (the "exponential race").
    """
    vocab = job[at.VOCAB]
    for number in range(job[at.SLOTS]):
        slot = skip(ints(job[at.SLOT_TABLE]), number * at.SLOT_SIZE)
        if slot[at.STATUS] == at.ACTIVE:
            weights = skip(floats(job[at.PROBABILITIES]), number * job[at.VOCAB_STRIDE])
            noise = skip(floats(job[at.NOISE]), number * vocab)
            for i in range(vocab):
                weights[i] /= noise[i]
            _append(job, number, slot, argmax(weights, vocab))


@kernel(INTS, INT64)
def _sample(job, thread):
    """Draw for this thread's share of the outputs, or only weigh the tokens."""
    vocab, stride = job[at.VOCAB], job[at.VOCAB_STRIDE]
    outputs, threads = job[at.OUTPUTS], job[at.THREADS]
    for output in range(
        part_start(outputs, thread, threads), part_start(outputs, thread + 1, threads)
    ):
        number = ints(job[at.OUTPUT_SLOT])[output]
        slot = skip(ints(job[at.SLOT_TABLE]), number * at.SLOT_SIZE)
        seen = skip(int8s(job[at.SEEN]), number * vocab)
        token = choose(
            skip(floats(job[at.LOGITS]), slot[at.LOGITS_ROW] * stride),
            skip(floats(job[at.PROBABILITIES]), number * stride),
            skip(floats(job[at.SCRATCH]), thread * stride),
            seen,
            vocab,
            slot,
            skip(floats(job[at.SETTINGS]), number * at.SETTINGS_SIZE),
            job[at.MODE] == at.DRAW,
        )
        if token < 0:
            slot[at.STATUS] = -token
            job[at.FAILED] = 1
        elif job[at.MODE] == at.DRAW:
            _append(job, number, slot, token)


@kernel(INT64, INT64)
def run(job_address, thread):
    """Do the job's steps, a token for every active slot each; all threads call this at once."""
    job = ints(job_address)
    if thread == 0:
        if job[at.MODE] == at.RACE:
            _take(job)
        for number in range(job[at.SLOTS]):
            skip(ints(job[at.SLOT_TABLE]), number * at.SLOT_SIZE)[at.STEPS_DONE] = 0
    for step in range(job[at.STEPS]):
        if thread == 0:
            job[at.OUTPUTS] = 0
            job[at.OUTPUTS_BEFORE] = 0
            _plan(job, step)
        barrier(job)
        while job[at.NUM_ROWS] > 0:
            forward(job, thread)
            barrier(job)
            if job[at.MODE] != at.PREFILL:
                _sample(job, thread)
            barrier(job)
            if thread == 0:
                _plan(job, step)
            barrier(job)
        if job[at.OUTPUTS_BEFORE] == 0:
            return  # no slot goes on
        barrier(job)  # nobody plans the next step before all have seen this one's end
