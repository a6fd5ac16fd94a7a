/* Progress on a terminal, and Ctrl-C.
 *
 *   ks_bar *bar;
 *   KS_TRY(ks_bar_create(&bar));
 *   ks_bar_share(bar, 0.25, 0.50, "window 2/4");             // what follows is this part of the whole
 *   ks_train(model, jobs, n, 0, ks_bar_progress(bar));       // "train 62 %"
 *   ks_bar_destroy(bar);                                     // clears the line
 *
 * On a terminal: one line on stderr, `window 2/4  train  62%  [=======>     ]  41%  0:31 gone, 0:44 to go`,
 * redrawn at most ten times a second. In a pipe, or with --quiet: nothing. Log lines clear the bar first.
 */
#ifndef KS_PROGRESS_H
#define KS_PROGRESS_H

#include "core/base/base.h"

/* SIGINT and SIGTERM from now on make every progress report say stop (KS_EINTERRUPTED); a second one ends the
 * process at once. */
void ks_interrupt_catch(void);
/* Whether one has come. */
bool ks_interrupted(void);

typedef struct ks_bar ks_bar;
ks_status ks_bar_create(ks_bar **out);
void ks_bar_destroy(ks_bar *b); /* NULL-safe; clears the line */
/* What is reported next covers [begin, end] of the whole, 0 <= begin <= end <= 1. label: shown first; copied;
 * may be NULL. */
void ks_bar_share(ks_bar *b, double begin, double end, const char *label);
/* Within the share, a stage of the work covers [begin, end] of it until the next ks_bar_share or
 * ks_bar_stage. */
void ks_bar_stage(ks_bar *b, double begin, double end);
/* For the library: stops the work after an interrupt, draws else. Valid as long as b; never NULL (b may be
 * NULL: interrupts alone). */
const ks_progress *ks_bar_progress(ks_bar *b);
/* No bar for the rest of the process (--quiet). clear_all: clears the one on the screen, whichever it is. */
void ks_bar_forbid(void);
void ks_bar_clear_all(void);
/* Clears the line until the next report: call before writing to the terminal. */
void ks_bar_clear(ks_bar *b);

#endif
