// SPDX-License-Identifier: GPL-2.0-or-later
/* The commands: a line of words in, one line `ok …` or `error …` out. */
#include "commands.h"
#include "serial.h"
#include "string.h"

static void do_info(struct words *w)
{
	u64 private = 0, shared = 0, accepted, unaccepted;

	(void)w;
	for (u32 i = 0; i < params.ram_count; i++)
		if (params.ram[i].flags & RAM_PRIVATE_CAPABLE)
			private += params.ram[i].size;
		else
			shared += params.ram[i].size;
	accept_counts(&accepted, &unaccepted);
	say("ok info vcpus=%u private_capable=%u shared_only=%u low_size=%x kernel=%x free=%x "
	    "shared_bit=%u log=%x window=%x window_pages=%u accepted=%u unaccepted=%u",
	    (u64)params.vcpus, private, shared, params.low_size, layout.kernel_gpa, layout.free_gpa,
	    (u64)params.shared_bit, params.log_gpa, stamp_head()->window_gfn << PAGE_SHIFT,
	    stamp_head()->window_pages, accepted, unaccepted);
}

static void begin_work(const struct words *w, u64 vcpu, enum mode mode)
{
	if (!work_start((u32)vcpu, mode))
		say("error %s: vcpu %u is busy or dead; stop it first", w->at[0], vcpu);
	else
		say("ok %s vcpu=%u gpa=%x pages=%u", w->at[0], vcpu, cpus[vcpu].work.gpa,
		    cpus[vcpu].work.npages);
}

static void do_spin(struct words *w)
{
	static const char *const names[] = { "random", "seq", "read", "write" };
	u64 vcpu, gpa, npages;
	u32 pattern = PATTERN_RANDOM;

	if (!vcpu_argument(w, 1, &vcpu) || !range_arguments(w, 2, &gpa, &npages, 1))
		return;
	if (w->count > 4) {
		while (pattern < ARRAY_LEN(names) && !streq(names[pattern], w->at[4]))
			pattern++;
		if (pattern == ARRAY_LEN(names)) {
			say("error spin: no pattern %s; random, seq, read, write", w->at[4]);
			return;
		}
	}
	if (cpus[vcpu].mode == MODE_IDLE)
		cpus[vcpu].work = (struct work){ .gpa = gpa, .npages = npages, .pattern = pattern,
						 .random = 0x9e3779b97f4a7c15UL + vcpu };
	begin_work(w, vcpu, MODE_SPIN);
}

static void do_stamp(struct words *w)
{
	u64 vcpu, gpa, npages, seed;

	if (!vcpu_argument(w, 1, &vcpu) || !range_arguments(w, 2, &gpa, &npages, 1) ||
	    !argument(w, 4, "SEED", &seed))
		return;
	if (!stamp_covers(gpa, npages)) {
		say("error stamp: range %x, %u pages is outside the window at %x; see window", gpa,
		    npages, stamp_head()->window_gfn << PAGE_SHIFT);
		return;
	}
	if (cpus[vcpu].mode == MODE_IDLE) {
		if (!any_mode(MODE_STAMP))
			stamp_forget(gpa, npages);
		cpus[vcpu].work = (struct work){
			.gpa = gpa,
			.npages = npages,
			.generation = cpus[vcpu].work.generation,
			.random = (seed + 1) * 0x9e3779b97f4a7c15UL | 1,
		};
	}
	begin_work(w, vcpu, MODE_STAMP);
}

static void do_window(struct words *w)
{
	u64 gpa;

	if (!argument(w, 1, "GPA", &gpa))
		return;
	if (gpa & (PAGE_SIZE - 1) || gpa >= 1UL << 39)
		say("error window: gpa %x must be a multiple of 4096 below 2^39", gpa);
	else if (!stamp_window(gpa))
		say("error window: a vcpu is stamping; stop it first");
	else
		say("ok window gpa=%x pages=%u", gpa, (u64)STAMP_WINDOW);
}

static void do_stop(struct words *w)
{
	u64 vcpu, first = 0, last = params.vcpus - 1;

	if (w->count > 1) {
		if (!vcpu_argument(w, 1, &vcpu))
			return;
		first = last = vcpu;
	}
	for (vcpu = first; vcpu <= last; vcpu++)
		if (!work_stop((u32)vcpu)) {
			say("error stop: vcpu %u does not answer or is dead", vcpu);
			return;
		}
	say("ok stop");
}

static void do_stat(struct words *w)
{
	static const char *const modes[] = { "idle", "spin", "stamp", "call", "dead" };
	u64 first = 0, last = params.vcpus - 1, vcpu;

	if (w->count > 1) {
		if (!vcpu_argument(w, 1, &vcpu))
			return;
		first = last = vcpu;
	}
	console_lock();
	print("ok stat vcpus=%u", last - first + 1);
	for (vcpu = first; vcpu <= last; vcpu++) {
		volatile struct stamp_vcpu *s = stamp_stats((u32)vcpu);

		print(" v%u.mode=%s v%u.loops=%u v%u.reads=%u v%u.writes=%u v%u.zeros=%u", vcpu,
		      modes[cpus[vcpu].mode], vcpu, s->loops, vcpu, s->reads, vcpu, s->writes,
		      vcpu, s->zeros);
		print(" v%u.punched=%u v%u.decisive=%u v%u.stale=%u v%u.lost=%u v%u.mismatches=%u",
		      vcpu, s->punched, vcpu, s->decisive, vcpu, s->stale, vcpu, s->lost, vcpu,
		      s->mismatches);
	}
	print("\n");
	console_unlock();
}

static void do_peek(struct words *w)
{
	enum side side;
	u64 gpa, value;

	if (!word_arguments(w, &gpa) || !side_argument(w, 2, gpa, &side))
		return;
	if (memory_peek(gpa, side, &value))
		say("ok peek gpa=%x side=%s value=%x", gpa, side_name(side), value);
	else
		trapped(w, gpa, side);
}

static void do_poke(struct words *w)
{
	enum side side;
	u64 gpa, value;

	if (!word_arguments(w, &gpa) || !argument(w, 2, "VALUE", &value) ||
	    !side_argument(w, 3, gpa, &side))
		return;
	if (memory_poke(gpa, side, value))
		say("ok poke gpa=%x side=%s value=%x", gpa, side_name(side), value);
	else
		trapped(w, gpa, side);
}

static void do_fill(struct words *w)
{
	u64 gpa, npages, value;

	if (!range_arguments(w, 1, &gpa, &npages, 1) || !argument(w, 3, "VALUE", &value))
		return;
	if (memory_fill(gpa, npages, value))
		say("ok fill gpa=%x pages=%u", gpa, npages);
	else
		trapped(w, gpa, SIDE_PRIVATE);
}

static void do_sum(struct words *w)
{
	u64 gpa, npages, sum;

	if (!range_arguments(w, 1, &gpa, &npages, 0))
		return;
	if (memory_sum(gpa, npages, &sum))
		say("ok sum gpa=%x pages=%u sum=%x", gpa, npages, sum);
	else
		trapped(w, gpa, SIDE_PRIVATE);
}

static void do_convert(struct words *w)
{
	u64 gpa, npages;
	enum side side;
	long ret;

	if (!argument(w, 1, "GPA", &gpa) || !argument(w, 2, "NPAGES", &npages))
		return;
	if (w->count < 4) {
		say("error convert: say private or shared");
		return;
	}
	if (!side_argument(w, 3, gpa, &side))
		return;
	/* Whether the range exists is the VMM's answer; our own feet are ours to protect. */
	if (gpa < layout.free_gpa && gpa + (npages << PAGE_SHIFT) > layout.kernel_gpa) {
		say("error convert: range %x, %u pages: the kernel lives there", gpa, npages);
		return;
	}
	ret = memory_convert(gpa, npages, side);
	if (ret == CONVERT_ALREADY)
		say("error convert: range %x, %u pages to %s: already accepted", gpa, npages,
		    side_name(side));
	else if (ret == CONVERT_FAILED)
		say("error convert: range %x, %u pages to %s: the processor answered %x", gpa,
		    npages, side_name(side), platform_status);
	else if (ret)
		say("error convert: range %x, %u pages to %s: the VMM answered %d", gpa, npages,
		    side_name(side), ret);
	else
		say("ok convert gpa=%x pages=%u side=%s", gpa, npages, side_name(side));
}

static void do_relinquish(struct words *w)
{
	u64 gpa, npages;
	long ret;

	if (!range_arguments(w, 1, &gpa, &npages, 1))
		return;
	if (!platform->relinquish) {
		say("error relinquish: %s has no call for it", platform->name);
		return;
	}
	ret = platform->relinquish(gpa, npages);
	if (ret)
		say("error relinquish: range %x, %u pages: the hypervisor answered %d", gpa,
		    npages, ret);
	else
		say("ok relinquish gpa=%x pages=%u", gpa, npages);
}

static void do_test(struct words *w)
{
	u64 gpa = 0, npages = 0;

	if (w->count > 1 && !range_arguments(w, 1, &gpa, &npages, 1))
		return;
	selftest(gpa, npages);
}

static void do_triple(struct words *w)
{
	(void)w;
	lidt(0, 0);
	asm volatile("ud2");
}

static void do_halt(struct words *w)
{
	u64 status = EXIT_OK;

	if (w->count > 1 && !argument(w, 1, "STATUS", &status))
		return;
	say("ok halt status=%u", status & 0xff);
	stop_machine((u32)status & 0xff);
}

static void do_help(struct words *w);

static const struct command {
	const char *name, *usage;
	void (*run)(struct words *w);
} commands[] = {
	{ "help", "", do_help },
	{ "info", "", do_info },
	{ "test", "[GPA NPAGES]", do_test },
	{ "spin", "VCPU GPA NPAGES [random|seq|read|write]", do_spin },
	{ "stamp", "VCPU GPA NPAGES SEED", do_stamp },
	{ "window", "GPA", do_window },
	{ "stop", "[VCPU]", do_stop },
	{ "stat", "[VCPU]", do_stat },
	{ "peek", "GPA [private|shared]", do_peek },
	{ "poke", "GPA VALUE [private|shared]", do_poke },
	{ "fill", "GPA NPAGES VALUE", do_fill },
	{ "sum", "GPA NPAGES", do_sum },
	{ "convert", "GPA NPAGES private|shared", do_convert },
	{ "relinquish", "GPA NPAGES", do_relinquish },
	{ "batch", "GPA NPAGES STRIDE COUNT private|shared", do_batch },
	{ "watch", "GPA [private|shared]", do_watch },
	{ "jump", "GPA [private|shared]", do_jump },
	{ "touch", "GPA", do_touch },
	{ "port", "PORT [VALUE]", do_port },
	{ "cpuid", "LEAF [SUBLEAF]", do_cpuid },
	{ "rdmsr", "INDEX", do_rdmsr },
	{ "tech", "", do_tech },
	{ "accept", "GPA NPAGES", do_accept },
	{ "report", "[HEX]", do_report },
	{ "bounce", "read|write GPA NPAGES SECTOR", do_bounce },
	{ "triple", "", do_triple },
	{ "halt", "[STATUS]", do_halt },
};

static void do_help(struct words *w)
{
	(void)w;
	console_lock();
	print("ok help");
	for (u32 i = 0; i < ARRAY_LEN(commands); i++)
		print("%s %s%s%s", i ? ";" : "", commands[i].name, commands[i].usage[0] ? " " : "",
		      commands[i].usage);
	print("\n");
	console_unlock();
}

void command_run(char *line)
{
	struct words w = { 0 };

	if (!split_words(line, &w))
		return;
	if (!w.count)
		return;
	for (u32 i = 0; i < ARRAY_LEN(commands); i++)
		if (streq(commands[i].name, w.at[0])) {
			commands[i].run(&w);
			return;
		}
	say("error %s: no such command, see help", w.at[0]);
}
