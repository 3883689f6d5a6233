"""The decoding loop: list the tokens to read, pass them through the model, draw the next ones.

A run does some steps; in a step each active slot gets one token. A step consists of one pass or
several, each over at most MAX_ROWS rows:

    thread 0:     _list_rows            _list_rows             ...
    all threads:             | forward            | forward
                             | _sample            | _sample

Letters: L window, V vocabulary.
"""

from __future__ import annotations

from mygpt.cpu.common.arithmetic import part_start
from mygpt.cpu.common.simd import INT64, INTS, floats, int8s, ints, kernel, skip
from mygpt.cpu.decode import layout as at
from mygpt.cpu.decode.forward import barrier, forward
from mygpt.cpu.decode.sample import argmax, choose_token


@kernel(INTS, INT64)
def _move_window(slot, window):
    """Sets START as `mygpt.core.window.Window.start`; a window that moved is read again."""
    # "crop" (and any text at first): the last L tokens. "refill", once full: the newer half of the
    # window. "stop" never gets past L tokens.
    length, start = slot[at.LENGTH], slot[at.START]
    if start < 0 or slot[at.OVERFLOW] == at.CROP:
        start = max(0, length - window)
    elif length - start > window:
        start = length - max(1, window // 2)
    if start != slot[at.START]:
        slot[at.START] = start
        slot[at.CACHED] = 0


@kernel(INTS, INT64, INT64, INTS)
def _list_slot_rows(job, step, number, slot):
    """Append rows for one slot: its unread tokens, as many as MAX_ROWS leaves space for."""
    start, cached, first = slot[at.START], slot[at.CACHED], job[at.NUM_ROWS]
    wanted = slot[at.LENGTH] - start - cached
    if job[at.MODE] == at.PREFILL:
        wanted -= 1  # the last token is read when its prediction is asked for
    elif wanted == 0:
        # Its probabilities were computed and no token was appended: compute the last token again.
        cached, wanted = cached - 1, 1
        slot[at.CACHED] = cached
    rows = max(0, min(wanted, job[at.MAX_ROWS] - first))
    # Row i of the slot is token start + cached + i of its text, at position cached + i of the
    # window: positions are counted from the window's start, so a cropped text's tokens all move by
    # one.
    text = skip(ints(job[at.TEXT]), number * job[at.TEXT_STRIDE] + start + cached)
    for i in range(rows):
        ints(job[at.ROW_SLOT])[first + i] = number
        ints(job[at.ROW_POSITION])[first + i] = cached + i
        ints(job[at.ROW_TOKEN])[first + i] = text[i]
    slot[at.CACHED] += rows
    job[at.NUM_ROWS] = first + rows
    # The row of the text's last token is an output: its logits are the prediction. A prompt of more
    # than MAX_ROWS tokens has it in a later pass.
    if rows == wanted and job[at.MODE] != at.PREFILL:
        output = job[at.OUTPUTS]
        ints(job[at.OUTPUT_SLOT])[output] = number
        ints(job[at.OUTPUT_ROW])[output] = first + rows - 1
        ints(job[at.OUTPUT_POSITION])[output] = cached + rows - 1
        slot[at.LOGITS_ROW] = job[at.OUTPUTS_BEFORE] + output
        slot[at.STEPS_DONE] = step + 1
        job[at.OUTPUTS] = output + 1


@kernel(INTS, INT64)
def _list_rows(job, step):
    """List the rows of the next pass: of each slot that has no prediction in this step yet."""
    # OUTPUTS_BEFORE makes the outputs of this pass follow those of the earlier ones in LOGITS.
    # Slots come in their order; the one that fills MAX_ROWS continues in the next pass.
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
            _list_slot_rows(job, step, number, slot)


@kernel(INTS, INT64, INTS, INT64)
def _append(job, number, slot, token):
    """Append a token to a slot's text; the slot ends at its limit or at a token that ends it."""
    ints(job[at.TEXT])[number * job[at.TEXT_STRIDE] + slot[at.LENGTH]] = token
    mark = skip(int8s(job[at.SEEN]), number * job[at.VOCAB] + token)
    ends = mark[0] & at.ENDS
    mark[0] |= at.OCCURRED
    slot[at.LENGTH] += 1
    slot[at.DRAWN] += 1
    if ends or slot[at.DRAWN] >= slot[at.LIMIT]:
        slot[at.STATUS] = at.ENDED
        # Later steps of other slots overwrite this row of logits. The slot needs no probabilities
        # any more, so its logits are kept in their place.
        kept = skip(floats(job[at.PROBABILITIES]), number * job[at.VOCAB_STRIDE])
        logits = skip(floats(job[at.LOGITS]), slot[at.LOGITS_ROW] * job[at.VOCAB_STRIDE])
        for i in range(job[at.VOCAB]):
            kept[i] = logits[i]
        slot[at.LOGITS_ROW] = -1


@kernel(INTS)
def _race(job):
    """Append to each active slot the token with the largest probability / noise.

    With noise from Exp(1) this draws from the probabilities, as torch.multinomial draws one token.
    """
    # The "exponential race": noise[i] / p[i] is exponential with rate p[i], and of independent
    # exponential numbers the smallest is number i with probability p[i] / (sum of p).
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
    """For this thread's part of the outputs: draw, or only compute the probabilities."""
    vocab, stride = job[at.VOCAB], job[at.VOCAB_STRIDE]
    outputs, threads = job[at.OUTPUTS], job[at.THREADS]
    # Each output is drawn by one thread, with the slot's own random numbers: how many threads there
    # are, and which other slots, has no influence on it.
    for output in range(
        part_start(outputs, thread, threads), part_start(outputs, thread + 1, threads)
    ):
        number = ints(job[at.OUTPUT_SLOT])[output]
        slot = skip(ints(job[at.SLOT_TABLE]), number * at.SLOT_SIZE)
        seen = skip(int8s(job[at.SEEN]), number * vocab)
        token = choose_token(
            skip(floats(job[at.LOGITS]), slot[at.LOGITS_ROW] * stride),
            skip(floats(job[at.PROBABILITIES]), number * stride),
            skip(floats(job[at.SCRATCH]), thread * stride), seen, vocab, slot,
            skip(floats(job[at.SETTINGS]), number * at.SETTINGS_SIZE), job[at.MODE] == at.DRAW,
        )  # fmt: skip
        if token < 0:
            slot[at.STATUS] = -token
            job[at.FAILED] = 1
        elif job[at.MODE] == at.DRAW:
            _append(job, number, slot, token)


@kernel(INT64, INT64)
def run(job_address, thread):
    """Do the job's steps, in each a token for every active slot; all threads call this at once."""
    # Thread 0 alone changes the job and the slots between passes. Before anyone reads what it has
    # listed, and before it lists again, there is a barrier.
    job = ints(job_address)
    if thread == 0:
        if job[at.MODE] == at.RACE:
            _race(job)
        for number in range(job[at.SLOTS]):
            skip(ints(job[at.SLOT_TABLE]), number * at.SLOT_SIZE)[at.STEPS_DONE] = 0
    for step in range(job[at.STEPS]):
        if thread == 0:
            job[at.OUTPUTS] = 0
            job[at.OUTPUTS_BEFORE] = 0
            _list_rows(job, step)
        barrier(job)
        while job[at.NUM_ROWS] > 0:
            forward(job, thread)
            barrier(job)
            if job[at.MODE] != at.PREFILL:
                _sample(job, thread)
            barrier(job)
            # A prompt that did not fit into one pass has rows left, so the step has another pass.
            if thread == 0:
                _list_rows(job, step)
            barrier(job)
        if job[at.OUTPUTS_BEFORE] == 0:
            return  # no slot is active
        barrier(job)  # all threads have read OUTPUTS_BEFORE before thread 0 sets it to 0
