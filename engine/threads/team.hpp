// The threads that ggml's CPU backend computes with: one pool for all contexts of the process.
//
// A computation is hundreds of short steps with a barrier after each, so how a thread waits there decides how fast
// we are alone, how well we share the cores with other programs, and how soon the first token comes after a pause. A
// waiting thread here turns for some microseconds, then offers its core to whoever else could run, again and again, and
// sleeps only after a millisecond or two. Alone nobody takes the offer, and nobody pays for waking a sleeper or a core;
// beside another program no time slice is spent on waiting for a thread that is not running. An offer costs who makes it,
// though, and most beside a program that never waits itself: so offers become rare while nobody takes them, or such a one
// does. And threads of one computation keep to different cores.
//
// gomp.cpp calls it for ggml, openmp.hpp for the rest of the engine. Functions that ask are of the calling thread.
#pragma once

namespace triollama::native {

// Runs work(data) on n threads, the caller among them, and returns when all are done. 0: one for each core that the
// process may use, or OMP_NUM_THREADS. Within a team the caller works alone. They run where the caller may, and as urgently.
void run_team(unsigned n, void (*work)(void *), void * data);

// Ends the threads that have nothing to do, and returns when they have ended. Those that will be needed come again.
void retire_team();

unsigned team_size();       // 1 outside of teams
unsigned team_rank();       // the caller of run_team has 0
bool in_team();             // of more than one

void team_barrier();
bool team_single();         // true for one thread of the team at each place in the program

// A loop whose iterations the threads of a team take in chunks, as they come. All begin it and all end it.
struct Chunk {
    long first = 0;
    long last = 0;          // exclusive
};
bool team_loop_begin(long first, long last, long step, long chunk, Chunk & mine);   // false: nothing is left
bool team_loop_next(Chunk & mine);

}  // namespace triollama::native
