// Threads that help with a loop, and whom nobody waits for.
//
// A decode step is hundreds of short loops. Where every thread owns a share of each loop, all wait for the slowest, and on
// a busy machine that one may not run for milliseconds. Here the pieces of a loop lie on one heap: whoever runs takes the
// next. A helper that sleeps, or that the system has put aside, takes none, and the caller does them itself.
#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

class Team {
  public:
    // Calls body(0) to body(count - 1), each once, by up to `threads` threads; returns when all are done.
    template <class Body>
    static void each(std::int64_t count, int threads, Body body) {
        auto call = [](void* what, std::int64_t index) { (*(Body*)what)(index); };
        Team& team = instance();
        std::unique_lock<std::mutex> turn(team.in_use, std::defer_lock);
        if (threads < 2 || count < 2 || !turn.try_lock()) {  // somebody else's loop has the helpers: go alone
            for (std::int64_t i = 0; i < count; ++i) body(i);
            return;
        }
        team.hire(threads - 1);
        team.share(count, threads - 1, call, &body);
    }

  private:
    // A loop is known by its number, so that a helper that comes late does not take a piece of the next one.
    static constexpr std::uint64_t CLOSED = 0xffffffff;
    // What threads write at different times stands on different lines of the cache.
    alignas(64) std::atomic<std::uint64_t> next{CLOSED};  // loop << 32 | its next piece
    alignas(64) std::atomic<std::int64_t> done{0};
    alignas(64) std::atomic<std::int64_t> count{0};
    std::atomic<int> wanted{0}, asleep{0};
    std::mutex in_use;
    void (*call)(void*, std::int64_t) = nullptr;
    void* body = nullptr;
    std::uint64_t loop = 0;
    int hired = 0;
    std::mutex bed;
    std::condition_variable alarm;

    static Team*& slot() {
        static Team* team = nullptr;
        return team;
    }

    static Team& instance() {
        static std::once_flag once;
        std::call_once(once, [] {
            slot() = new Team;
            pthread_atfork(nullptr, nullptr, [] { slot() = new Team; });  // a forked child has no helpers yet
        });
        return *slot();
    }

    void hire(int helpers) {
        for (; hired < helpers; ++hired) std::thread([this, me = hired] { help(me); }).detach();
    }

    void share(std::int64_t pieces, int helpers, void (*how)(void*, std::int64_t), void* what) {
        call = how, body = what;
        count = pieces, done = 0, wanted = helpers;
        next = ++loop << 32;
        if (asleep > 0) {
            std::lock_guard<std::mutex> lock(bed);
            alarm.notify_all();
        }
        take(loop);
        for (int tries = 0; done < pieces; ++tries) pause(tries);
        next = loop << 32 | CLOSED;  // before anything of the next loop is written
    }

    // Do pieces of a loop until there are none left.
    void take(std::uint64_t of) {
        std::int64_t mine = 0;
        for (std::uint64_t ticket = next; ticket >> 32 == of && std::int64_t(ticket & CLOSED) < count;) {
            if (!next.compare_exchange_weak(ticket, ticket + 1)) continue;
            call(body, ticket & CLOSED);
            ++mine;
            ticket = next;
        }
        if (mine) done += mine;  // the loop cannot end, and nothing of it change, before this
    }

    void help(int me) {
        for (std::uint64_t seen = 0;;) {
            for (int tries = 0; next >> 32 == seen && tries < 10000; ++tries) pause(0);  // some tenths of a millisecond
            if (next >> 32 == seen) {
                std::unique_lock<std::mutex> lock(bed);
                ++asleep;
                alarm.wait(lock, [&] { return next >> 32 != seen; });
                --asleep;
            }
            seen = next >> 32;
            if (me < wanted) take(seen);
        }
    }

    static void pause(int tries) {
        if (tries > 10000) return std::this_thread::yield();  // whoever holds the last piece may need this processor
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
};
