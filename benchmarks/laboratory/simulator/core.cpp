// Replays the instructions of a kernel on a few processors that share their part of a GPU's L2 and DRAM.
// Reads `name value` lines, then `@ segment` and its instructions (core.py, Event); writes one line of JSON.
// Everything assumed of the hardware is a value with a name (assumptions.py). Time is in cycles.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <vector>

using Time = double;
constexpr Time NEVER = 1e18;
constexpr int SCHEDULERS = 4, SCOREBOARDS = 6, SEGMENTS = 3, PIPES = 10;

// As PIPES and KINDS of assumptions.py.
enum Pipe { FMA, IMAD, ALU, XU, TENSOR, MEMORY, UNIFORM, CONTROL, BARRIER, FP64 };
enum Kind {
    FIXED, SHARED, L1, L2, DRAM, STORE_L2, STORE_DRAM, SPECIAL, CONSTANT, SHUFFLE, OTHER, ASYNC_DRAM, ASYNC_L2, COMMIT,
    WAIT_GROUP, KINDS
};
// What a warp waits for beside the kinds.
enum Wait { AT_BARRIER = KINDS, STALLED, NOT_CHOSEN, WAITS };
const char* WAIT_NAMES[WAITS] = {
    "fixed", "shared", "l1", "l2", "dram", "store l2", "store dram", "special", "constant", "shuffle", "other",
    "async dram", "async l2", "commit", "wait group", "barrier", "stall", "not chosen"};

struct Instruction {
    int pipe; double cycles; int stall, wait, result, operands, kind; double moved, shared;
    bool to_dram() const { return kind == DRAM || kind == STORE_DRAM || kind == ASYNC_DRAM; }
};

struct Warp {
    int segment = 0;
    size_t at = 0;
    long tile = 0;
    Time next = 0;                                    // its next instruction, scoreboards apart
    Time clear[SCOREBOARDS] = {};                     // when each scoreboard is
    int kind[SCOREBOARDS] = {};                       // and what set it
    Time copies = 0;                                  // end of the asynchronous copies since the last commit
    std::vector<Time> groups;                         // ends of the committed ones
    Time arrived = 0;
    bool done = true, at_barrier = false;
};

struct Program { int warps = 0, arrived = 0; long tiles = 0; };

// One streaming multiprocessor. Units are free from these times on.
struct Processor {
    std::vector<Warp> warps;
    std::vector<Program> programs;
    std::vector<long> queue;                          // tiles of the persistent programs that will start here
    Time shared = 0, l1 = 0, port_in = 0, port_out = 0;
    Time pipe[SCHEDULERS][PIPES] = {};
    Time wake[SCHEDULERS] = {};                       // before this a scheduler has nothing to issue
    int last[SCHEDULERS] = {};
};

// What core.py says of the launch, and what it assumes.
struct Values {
    double tiles, warps, resident, programs, persistent, seed, skew, sample;
    double processors, dram, l2, port, l1, shared, write_cost, backlog, greedy;
    double dram_latency, l2_latency, l1_latency, shared_latency, shuffle_latency, special_latency, constant_latency;
    double other_latency, fixed_latency, barrier_latency, unit_delay, store_delay, launch;

    explicit Values(std::map<std::string, double>& given) {
        auto take = [&](double& value, const char* name) {
            if (!given.count(name)) { std::fprintf(stderr, "no value of %s\n", name); std::exit(1); }
            value = given[name];
        };
#define TAKE(name) take(name, #name);
        TAKE(tiles) TAKE(warps) TAKE(resident) TAKE(programs) TAKE(persistent) TAKE(seed) TAKE(skew) TAKE(sample)
        TAKE(processors) TAKE(dram) TAKE(l2) TAKE(port) TAKE(l1) TAKE(shared) TAKE(dram_latency) TAKE(l2_latency)
        TAKE(l1_latency) TAKE(shared_latency) TAKE(shuffle_latency) TAKE(special_latency) TAKE(constant_latency)
        TAKE(other_latency) TAKE(fixed_latency) TAKE(barrier_latency) TAKE(unit_delay) TAKE(store_delay) TAKE(launch)
        TAKE(write_cost) TAKE(backlog) TAKE(greedy)
#undef TAKE
    }
};

using Code = std::vector<Instruction>[SEGMENTS];

struct Machine {
    const Values given;
    const Code& code;
    std::vector<Processor> processors;
    const int warps = int(given.warps), resident = int(given.resident), first_choice = given.greedy > 0 ? 0 : 1;
    const bool persistent = given.persistent > 0;
    // L2 and DRAM have the sample's share of the GPU's bytes per cycle.
    const double l2_rate = given.l2 * given.sample, dram_rate = given.dram * given.sample;
    Time now = 0, l2 = 0, dram = 0, last_end = 0;     // L2 and DRAM are free from there on
    long live = 0, handed_out = 0, share = 0;
    double issued = 0, dram_bytes = 0, waited[WAITS] = {};

    Machine(const Values& values, const Code& segments)
        : given(values), code(segments), processors(size_t(values.sample)) {}

    int scheduler_of(int index) const { return (warps >= SCHEDULERS ? index % warps : index) % SCHEDULERS; }
    void hand_out();
    bool start(Processor&, int program, Time at);
    Time ready(const Processor&, int scheduler, const Warp&, const Instruction&) const;
    void schedule(Processor&, int scheduler);
    void account(const Warp&, const Instruction&);
    void issue(Processor&, int scheduler, int index);
    void load(Processor&, const Instruction&, bool from_dram, Time& read, Time& done);
    void release(Processor&, int program);
    void advance(Processor&, int index);
    void run();
    void report() const;
};

// Gives the processors of the sample what they would have of the whole GPU's programs.
void Machine::hand_out() {
    const long all = long(given.processors), sample = long(processors.size()), tiles = long(given.tiles);
    if (persistent) {
        const long grid = std::min(tiles, long(given.programs) * all);
        for (long p = 0; p < grid; p++) {
            const long here = p % all, picked = here * sample / all;
            if (here != (picked * all + sample - 1) / sample) continue;
            processors[picked].queue.push_back((tiles - p + grid - 1) / grid);
        }
    } else {
        share = (tiles * sample + all - 1) / all;
    }
    std::mt19937 random(unsigned(given.seed));
    std::uniform_real_distribution<double> moment(0, 1);
    for (auto& processor : processors) processor.warps.resize(resident * warps), processor.programs.resize(resident);
    for (int program = 0; program < resident; program++)
        for (auto& processor : processors) start(processor, program, moment(random) * given.skew + program * 100);
}

bool Machine::start(Processor& processor, int program, Time at) {
    long tiles = 1;
    if (persistent) {
        if (processor.queue.empty()) return false;
        tiles = processor.queue.front();
        processor.queue.erase(processor.queue.begin());
    } else if (handed_out++ >= share) {
        return false;
    }
    processor.programs[program] = {warps, 0, tiles};
    for (int j = 0; j < warps; j++) {
        Warp& warp = processor.warps[program * warps + j] = Warp();
        warp.done = false, warp.next = at + j * 2;
        std::fill_n(warp.kind, SCOREBOARDS, int(OTHER));
        while (warp.segment < SEGMENTS && code[warp.segment].empty()) warp.segment++;
    }
    std::fill_n(processor.wake, SCHEDULERS, now);
    live += warps;
    return true;
}

Time Machine::ready(const Processor& processor, int scheduler, const Warp& warp, const Instruction& i) const {
    Time at = warp.next;
    for (int b = 0; b < SCOREBOARDS; b++)
        if (i.wait >> b & 1) at = std::max(at, warp.clear[b]);
    if (i.kind == WAIT_GROUP) {
        const int group = int(warp.groups.size()) - 1 - int(i.moved);
        if (group >= 0) at = std::max(at, warp.groups[group]);
    }
    Time pipe = processor.pipe[scheduler][i.pipe];
    if (i.pipe == FMA) pipe = std::min(pipe, processor.pipe[scheduler][IMAD]);
    at = std::max(at, pipe);
    if (i.to_dram() && dram - now > given.backlog) at = std::max(at, dram - given.backlog);
    return at;
}

// Issues one instruction of a warp that is ready: the last one's, or the first behind it.
void Machine::schedule(Processor& processor, int scheduler) {
    const int count = int(processor.warps.size());
    int chosen = -1, candidates = 0;
    Time wake = NEVER;
    for (int q = 0; q < count; q++) {
        const int index = (processor.last[scheduler] + q + first_choice) % count;
        const Warp& warp = processor.warps[index];
        if (scheduler_of(index) != scheduler || warp.done || warp.at_barrier) continue;
        const Time at = ready(processor, scheduler, warp, code[warp.segment][warp.at]);
        if (at > now) { wake = std::min(wake, at); continue; }
        candidates++;
        if (chosen < 0) chosen = index;
    }
    processor.wake[scheduler] = candidates > 1 ? now + 1 : wake;
    if (chosen >= 0) issue(processor, scheduler, chosen);
}

// What a warp waited for before the instruction that it issues now: the scoreboard that was clear last.
void Machine::account(const Warp& warp, const Instruction& i) {
    Time at = warp.next;
    int reason = NOT_CHOSEN;
    for (int b = 0; b < SCOREBOARDS; b++)
        if ((i.wait >> b & 1) && warp.clear[b] > at) at = warp.clear[b], reason = warp.kind[b];
    if (i.kind == WAIT_GROUP) {
        const int group = int(warp.groups.size()) - 1 - int(i.moved);
        if (group >= 0 && warp.groups[group] > at) at = warp.groups[group], reason = WAIT_GROUP;
    }
    waited[reason] += at - warp.next;
    if (now > at) waited[NOT_CHOSEN] += now - at;
}

// A read from L2 or DRAM: through L1 to L2, to DRAM, and back through the processor's port.
void Machine::load(Processor& p, const Instruction& i, bool from_dram, Time& read, Time& done) {
    const Time begun = std::max(now + given.unit_delay, p.l1), left = begun + std::max(1.0, i.moved / given.l1);
    p.l1 = left, read = left + given.unit_delay;
    l2 = std::max(left, l2) + i.moved / l2_rate;
    Time fetched = l2;
    if (from_dram) {
        fetched = dram = std::max(l2, dram) + i.moved / dram_rate;
        dram_bytes += i.moved;
    }
    const Time latency = from_dram ? given.dram_latency : given.l2_latency;
    done = p.port_in = std::max(fetched + latency - given.fixed_latency, p.port_in) + i.moved / given.port;
}

void Machine::issue(Processor& p, int scheduler, int index) {
    Warp& warp = p.warps[index];
    const Instruction& i = code[warp.segment][warp.at];
    p.last[scheduler] = index;
    account(warp, i);
    issued++;
    const bool heavy = i.pipe == FMA && p.pipe[scheduler][FMA] > now;  // its other half, which alone has IMAD
    p.pipe[scheduler][heavy ? int(IMAD) : i.pipe] = now + i.cycles;

    Time done = now + given.fixed_latency, read = done;
    switch (i.kind) {
        case SHARED: case SHUFFLE: {
            const Time begun = std::max(now + given.unit_delay, p.shared);
            p.shared = begun + i.shared;
            const Time passed = i.kind == SHARED ? p.shared : begun;
            done = passed + (i.kind == SHARED ? given.shared_latency : given.shuffle_latency) - given.unit_delay;
            read = passed + given.unit_delay;
            break;
        }
        case SPECIAL: done = now + given.special_latency; break;
        case CONSTANT: done = now + given.constant_latency; break;
        case OTHER: done = now + given.other_latency; break;
        case L1: {
            p.l1 = std::max(now + given.unit_delay, p.l1) + std::max(1.0, i.moved / given.l1);
            done = p.l1 + given.l1_latency - given.unit_delay, read = p.l1 + given.unit_delay;
            break;
        }
        case L2: case DRAM: load(p, i, i.kind == DRAM, read, done); break;
        case ASYNC_L2: case ASYNC_DRAM: {
            Time landed;
            load(p, i, i.kind == ASYNC_DRAM, read, landed);
            // The write to shared memory, charged now rather than when it lands.
            p.shared = std::max(p.shared, now) + i.moved / given.shared;
            warp.copies = std::max(warp.copies, landed + given.shared_latency);
            break;
        }
        case COMMIT: {
            done = warp.groups.empty() ? warp.copies : std::max(warp.copies, warp.groups.back());
            warp.groups.push_back(done);
            warp.copies = 0;
            break;
        }
        case STORE_L2: case STORE_DRAM: {
            p.l1 = std::max(now + given.unit_delay, p.l1) + std::max(1.0, i.moved / given.l1);
            read = p.l1 + given.store_delay;
            const Time sent = std::max(p.l1, p.port_out);
            p.port_out = sent + i.moved / given.port;
            l2 = std::max(sent, l2) + i.moved / l2_rate;
            if (i.kind == STORE_DRAM) {
                dram = std::max(l2, dram) + given.write_cost * i.moved / dram_rate;
                dram_bytes += i.moved;
            }
            break;
        }
        default: break;
    }
    for (auto [scoreboard, at] : {std::pair(i.result, done), std::pair(i.operands, read)})
        if (scoreboard < SCOREBOARDS && at > warp.clear[scoreboard])
            warp.clear[scoreboard] = at, warp.kind[scoreboard] = i.kind;
    const Time stall = std::max(1, i.stall);
    waited[STALLED] += stall;
    warp.next = now + stall;

    const int program = index / warps;
    const bool barrier = i.pipe == BARRIER;
    advance(p, index);
    if (barrier) {
        warp.at_barrier = true, warp.arrived = now;
        p.programs[program].arrived++;
    }
    if (warp.segment >= SEGMENTS) {
        warp.done = true, live--, last_end = std::max(last_end, now);
        if (--p.programs[program].warps == 0) start(p, program, now + given.launch);
    }
    if (p.programs[program].arrived && p.programs[program].arrived == p.programs[program].warps) release(p, program);
    if (!warp.done && !warp.at_barrier) p.wake[scheduler] = std::min(p.wake[scheduler], std::max(now + 1, warp.next));
}

// To the warp's next instruction: the body once per tile, the segments in order.
void Machine::advance(Processor& p, int index) {
    Warp& warp = p.warps[index];
    if (++warp.at < code[warp.segment].size()) return;
    warp.at = 0;
    if (warp.segment == 1 && ++warp.tile < p.programs[index / warps].tiles) return;
    do warp.segment++; while (warp.segment < SEGMENTS && code[warp.segment].empty());
}

// All warps of a program are at the barrier.
void Machine::release(Processor& p, int program) {
    const Time released = now + given.barrier_latency;
    p.programs[program].arrived = 0;
    for (int j = 0; j < warps; j++) {
        Warp& warp = p.warps[program * warps + j];
        if (!warp.at_barrier) continue;
        warp.at_barrier = false;
        waited[AT_BARRIER] += released - warp.arrived;
        warp.next = std::max(warp.next, released);
        const int scheduler = scheduler_of(program * warps + j);
        p.wake[scheduler] = std::min(p.wake[scheduler], warp.next);
    }
}

void Machine::run() {
    hand_out();
    while (live > 0) {
        Time next = NEVER;
        for (auto& processor : processors)
            for (int s = 0; s < SCHEDULERS; s++)
                if (processor.wake[s] <= now) schedule(processor, s);
        for (auto& processor : processors)
            for (int s = 0; s < SCHEDULERS; s++) next = std::min(next, processor.wake[s]);
        if (live > 0 && next >= NEVER) {
            std::fprintf(stderr, "%ld warps wait for ever at cycle %.0f\n", live, now);
            std::exit(1);
        }
        now = std::max(now + 1, std::ceil(next - 1e-6));
    }
}

void Machine::report() const {
    const double cycles = std::max(last_end, dram), sample = double(processors.size());
    double all = 0;
    for (double w : waited) all += w;
    std::printf("{\"cycles\": %.0f, \"issue\": %.6f, \"dram_bytes_per_cycle\": %.6f, \"waits\": {", cycles,
                issued / cycles / sample / SCHEDULERS, dram_bytes / cycles / sample);
    const char* comma = "";
    for (int w = 0; w < WAITS; w++)
        if (waited[w] > 0) std::printf("%s\"%s\": %.6f", comma, WAIT_NAMES[w], waited[w] / all), comma = ", ";
    std::printf("}}\n");
}

void read(std::istream& in, std::map<std::string, double>& values, Code& code) {
    std::string line;
    int segment = -1;
    while (std::getline(in, line) && line != "@ end") {
        std::istringstream words(line);
        if (line[0] == '@') {
            char mark;
            words >> mark >> segment;
        } else if (segment < 0) {
            std::string name;
            words >> name;
            words >> values[name];
        } else {
            Instruction i;
            words >> i.pipe >> i.cycles >> i.stall >> i.wait >> i.result >> i.operands >> i.kind >> i.moved >> i.shared;
            code[segment].push_back(i);
        }
    }
}

int main() {
    std::map<std::string, double> values;
    Code code;
    read(std::cin, values, code);
    Machine machine(Values(values), code);
    machine.run();
    machine.report();
}
