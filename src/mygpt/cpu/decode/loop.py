"""The decoding loop: list the tokens to read, pass them through the model, draw the next ones.

A run does some steps; in a step each active slot gets one token, or several where drafts of the
next ones are right. A step consists of one pass or several, each over at most MAX_ROWS rows:

    thread 0:     _list_rows            _list_rows             ...
    all threads:             | forward            | forward
                             | _sample            | _sample

**Drafts** (see `draft`) make one reading of the weights give several tokens. A text that ends with
the token x gets drafts a, b and c, and one pass reads x, a, b and c:

    row        x        a        b        c
    logits     P(.|x)   P(.|xa)  P(.|xab) P(.|xabc)
    drawn      a        b        d                      from left to right, each as without drafts

The token that is drawn after x is a: so the row of a has read what it would have read, and its
logits are those that decoding without drafts has. Likewise for b; then d is drawn where c had been
guessed, and the last row is of no use. This is speculative decoding (Leviathan et al., 2023; Chen
et al., 2023), but nothing is accepted or rejected by chance: each token is drawn from the model's
own logits with its own random number, and a row's sums do not depend on the rows beside it. So the
tokens are bitwise those without drafts.

Letters: L window, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from mygpt.cpu.common.arithmetic import part_start
from mygpt.cpu.common.simd import FLOATS, INT64, INTS, floats, int8s, ints, kernel, skip
from mygpt.cpu.decode import layout as at
from mygpt.cpu.decode.draft import write_drafts
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


@kernel(INTS, INT64, INTS, INTS, INT64, returns=INT64)
def _draft(job, number, slot, text, cached):
    """Write drafts behind the text of a slot of which one token is unread; their number."""
    # As many as may be drawn after the next token, fit into the window (so that it does not move
    # meanwhile), and have space among this pass's rows and outputs.
    most = min(job[at.MOST_DRAFTS], slot[at.GOAL] - slot[at.DRAWN] - 1)
    most = min(most, job[at.WINDOW] - cached - 1)
    most = min(most, job[at.MAX_ROWS] - job[at.NUM_ROWS] - 1)
    most = min(most, job[at.SPARE_OUTPUTS] - job[at.DRAFTS_LISTED])
    if most <= 0 or slot[at.TRUSTED] == 0:
        return 0
    drafts = write_drafts(job, number, slot, text, most)
    job[at.DRAFTS_LISTED] += drafts
    return drafts


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
    own = skip(ints(job[at.TEXT]), number * job[at.TEXT_STRIDE])
    drafts = np.int64(0)
    if wanted == 1 and job[at.MODE] == at.DRAW:
        drafts = _draft(job, number, slot, own, cached)
        wanted += drafts
    slot[at.DRAFTED] = drafts
    rows = max(0, min(wanted, job[at.MAX_ROWS] - first))
    # Row i of the slot is token start + cached + i of its text, at position cached + i of the
    # window: positions are counted from the window's start, so a cropped text's tokens all move by
    # one.
    text = skip(own, start + cached)
    for i in range(rows):
        ints(job[at.ROW_SLOT])[first + i] = number
        ints(job[at.ROW_POSITION])[first + i] = cached + i
        ints(job[at.ROW_TOKEN])[first + i] = text[i]
    slot[at.CACHED] += rows
    job[at.NUM_ROWS] = first + rows
    # The row of the text's last token is an output: its logits are the prediction. So are those of
    # the drafts. A prompt of more than MAX_ROWS tokens has its output in a later pass.
    if rows == wanted and job[at.MODE] != at.PREFILL:
        output = job[at.OUTPUTS]
        for row in range(rows - 1 - drafts, rows):
            ints(job[at.OUTPUT_SLOT])[job[at.OUTPUTS]] = number
            ints(job[at.OUTPUT_ROW])[job[at.OUTPUTS]] = first + row
            ints(job[at.OUTPUT_POSITION])[job[at.OUTPUTS]] = cached + row
            job[at.OUTPUTS] += 1
        slot[at.LOGITS_ROW] = job[at.OUTPUTS_BEFORE] + output
        slot[at.STEPS_DONE] = step + 1
        slot[at.PASSES + drafts] += 1


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
            and (job[at.MODE] != at.DRAW or slot[at.DRAWN] < slot[at.ENOUGH])
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


@kernel(INTS, INT64, INTS)
def _keep_logits(job, number, slot):
    """Keep a slot's logits that later steps of other slots would overwrite."""
    # The slot needs no probabilities until its next step: the logits are kept in their place.
    kept = skip(floats(job[at.PROBABILITIES]), number * job[at.VOCAB_STRIDE])
    logits = skip(floats(job[at.LOGITS]), slot[at.LOGITS_ROW] * job[at.VOCAB_STRIDE])
    for i in range(job[at.VOCAB]):
        kept[i] = logits[i]
    slot[at.LOGITS_ROW] = -1


@kernel(FLOATS, FLOATS, INT64, returns=INT64)
def _race(weights, noise, vocab):
    """The token with the largest weight / noise.

    With noise from Exp(1) this draws from the weights, as torch.multinomial draws one token.
    """
    # The "exponential race": noise[i] / p[i] is exponential with rate p[i], and of independent
    # exponential numbers the smallest is number i with probability p[i] / (sum of p).
    for i in range(vocab):
        weights[i] /= noise[i]
    return argmax(weights, vocab)


@kernel(INTS, INT64, INT64, INTS, INT64, returns=INT64)
def _sample_one(job, thread, number, slot, ahead):
    """Draw from the output after `ahead` drafts that were right; whether the next draft is too."""
    vocab, stride = job[at.VOCAB], job[at.VOCAB_STRIDE]
    token = choose_token(
        skip(floats(job[at.LOGITS]), slot[at.LOGITS_ROW] * stride),
        skip(floats(job[at.PROBABILITIES]), number * stride),
        skip(floats(job[at.SCRATCH]), thread * stride),
        skip(int8s(job[at.SEEN]), number * vocab), vocab, slot,
        skip(floats(job[at.SETTINGS]), number * at.SETTINGS_SIZE), job[at.MODE] == at.DRAW,
    )  # fmt: skip
    is_last = ahead == slot[at.DRAFTED]
    if token < 0 and not is_last:
        # A wrong draft can break the rows beside it: attention multiplies its values by 0, and 0
        # times infinity is not 0. The next step reads the last token again, without drafts.
        slot[at.TRUSTED] = 0
        slot[at.LOGITS_ROW] -= ahead > 0  # those of the last token that was drawn
        return 0
    if token < 0:
        slot[at.STATUS] = -token
        job[at.FAILED] = 1
        return 0
    if job[at.MODE] == at.PREDICT:
        return 0
    if job[at.MODE] == at.RACE:  # the noise is (steps, slots, V); STEPS_DONE counts this step
        line = (slot[at.STEPS_DONE] - 1) * job[at.SLOTS] + number
        weights = skip(floats(job[at.PROBABILITIES]), number * stride)
        token = _race(weights, skip(floats(job[at.NOISE]), line * vocab), vocab)
    draft = ints(job[at.TEXT])[number * job[at.TEXT_STRIDE] + slot[at.LENGTH]]
    _append(job, number, slot, token)
    if is_last or slot[at.STATUS] != at.ACTIVE:
        return 0
    slot[at.ACCEPTED + ahead] += draft == token
    return draft == token


@kernel(INTS, INT64)
def _sample(job, thread):
    """For the slots of this thread's part of the outputs: draw, or only compute probabilities."""
    outputs, threads = job[at.OUTPUTS], job[at.THREADS]
    # Each slot's outputs are drawn by one thread, with the slot's own random numbers: how many
    # threads there are, and which other slots, has no influence on it.
    for output in range(
        part_start(outputs, thread, threads), part_start(outputs, thread + 1, threads)
    ):
        number = ints(job[at.OUTPUT_SLOT])[output]
        if output > 0 and ints(job[at.OUTPUT_SLOT])[output - 1] == number:
            continue  # the slot's first output is another one, whose thread draws for all
        slot = skip(ints(job[at.SLOT_TABLE]), number * at.SLOT_SIZE)
        for ahead in range(slot[at.DRAFTED] + 1):
            slot[at.LOGITS_ROW] = job[at.OUTPUTS_BEFORE] + output + ahead
            if not _sample_one(job, thread, number, slot, ahead):
                break
        if slot[at.DRAFTED] > 0:  # the rows of wrong drafts are forgotten
            slot[at.CACHED] = min(slot[at.CACHED], slot[at.LENGTH] - slot[at.START] - 1)
        has_enough = slot[at.STATUS] == at.ENDED or slot[at.DRAWN] >= slot[at.ENOUGH]
        if job[at.MODE] != at.PREDICT and has_enough:
            _keep_logits(job, number, slot)


@kernel(INT64, INT64)
def run(job_address, thread):
    """Do the job's steps, in each a token for every active slot; all threads call this at once."""
    # Thread 0 alone changes the job and the slots between passes. Before anyone reads what it has
    # listed, and before it lists again, there is a barrier.
    job = ints(job_address)
    if thread == 0:
        for number in range(job[at.SLOTS]):
            skip(ints(job[at.SLOT_TABLE]), number * at.SLOT_SIZE)[at.STEPS_DONE] = 0
    for step in range(job[at.STEPS]):
        if thread == 0:
            job[at.OUTPUTS] = 0
            job[at.OUTPUTS_BEFORE] = 0
            job[at.DRAFTS_LISTED] = 0
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
