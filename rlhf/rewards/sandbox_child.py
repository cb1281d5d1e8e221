"""What runs in the process that `rlhf.rewards.sandbox` starts: it locks itself in for good, then does one task.

The standard library alone is imported here. The task comes as JSON on stdin, its result leaves through what stdout was
at the start; the task itself sees /dev/null in their place.
"""

import ctypes
import errno
import json
import os
import platform
import re
import resource
import signal
import struct
import sys
import types

SYSTEM_CALLS = {  # of x86-64 and arm64; None where the machine has no such call
    # network, and every way round its refusal
    "socket": (41, 198), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    # other processes, and new ones
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "unshare": (272, 97), "setns": (308, 268),
    # what outlives the process, or lies outside its directory
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "memfd_create": (319, 279), "mount": (165, 40),
    "umount2": (166, 39), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "setrlimit": (160, 164),
}  # fmt: skip
"""Calls that are answered with "not permitted" whatever their arguments."""
CLONE, CLONE3, KILL, TGKILL, PRLIMIT = (56, 220), (435, 435), (62, 129), (234, 131), (302, 261)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*

LOAD, EQUAL, AT_LEAST, HAS_BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # instructions of classic BPF
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
ALLOW, KILL_PROCESS, NOT_PERMITTED = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
NO_SUCH_CALL = 0x00050000 | errno.ENOSYS
THREAD = 0x10000  # CLONE_THREAD
DEATH_SIGNAL, SECCOMP, NO_NEW_PRIVILEGES, FILTER_MODE = 1, 22, 38, 2  # prctl
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same number on every machine
WRITE_FILE, TRUNCATE, REFER = 1 << 1, 1 << 14, 1 << 13
WRITES = WRITE_FILE | sum(1 << bit for bit in range(4, 13))  # write, and make or remove any kind of entry

LIBC = ctypes.CDLL(None, use_errno=True)


def main():
    given = os.fdopen(os.dup(0), "rb")
    task = json.loads(given.readline())
    output = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nothing, descriptor)
    sys.path[:] = task["path"]
    checks = {"regex": prepare_regex, "json_schema": prepare_json_schema, "math": prepare_math}
    check = checks[task["kind"]]() if task["kind"] in checks else None  # imports come before the limits
    try:
        confine(task["directory"], task["cpu_s"], task["memory_bytes"], task["file_bytes"])
    except (OSError, ValueError) as error:
        os.write(output, f"{task['proof']} {error}".encode(errors="replace"))
        return
    if check is None:
        run_program(task["parts"], task["proof"].encode(), output)
    elif task.get("serves"):
        serve(check, given, output, task["row_s"])
    else:
        os.write(output, json.dumps(run_checks(check, task["rows"], task["row_s"])).encode())


def confine(directory, cpu_s, memory_bytes, file_bytes):
    """Give up, until the process ends: more CPU time, memory and file size than these, writing outside `directory`,
    sockets, other processes, and the rights of root. None is any CPU time, and no directory to write in.

    Raises:
        OSError: the kernel refused; ValueError: the machine is unknown. Then nothing must be run.
    """
    limits = {
        resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_FSIZE: file_bytes, resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }  # fmt: skip
    if cpu_s is not None:
        limits[resource.RLIMIT_CPU] = cpu_s
    for limit, value in limits.items():
        highest = resource.getrlimit(limit)[1]
        value = value if highest == resource.RLIM_INFINITY else min(value, highest)
        resource.setrlimit(limit, (value, value))
    if cpu_s is not None:  # the signal comes when the thread ends that started the process
        demand("PR_SET_PDEATHSIG", LIBC.prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0))
    demand("PR_SET_NO_NEW_PRIVS", LIBC.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    forbid_writing_outside(directory)
    version_and_self = struct.pack("Ii", 0x20080522, 0)
    demand("capset", LIBC.capset(version_and_self, bytes(24)))
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in system_call_filter())
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    demand("PR_SET_SECCOMP", LIBC.prctl(SECCOMP, FILTER_MODE, header, 0, 0))


def demand(what, result):
    """The result of a system call, unless it is an error."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def forbid_writing_outside(directory):
    """By Landlock; a kernel without it (before 5.13, or switched off) leaves the user's own permissions."""
    version = LIBC.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return
    handled = WRITES | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    rules = demand("landlock_create_ruleset", LIBC.syscall(LANDLOCK_CREATE, struct.pack("Q", handled), 8, 0))
    places = {} if directory is None else {directory: handled}
    for path, allowed in {**places, os.devnull: handled & (WRITE_FILE | TRUNCATE)}.items():
        place = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", allowed, place)
        demand("landlock_add_rule", LIBC.syscall(LANDLOCK_ADD, rules, 1, rule, 0))
        os.close(place)
    demand("landlock_restrict_self", LIBC.syscall(LANDLOCK_RESTRICT, rules, 0))
    os.close(rules)


def system_call_filter():
    """The seccomp filter, as (code, jump if true, jump if false, constant) of classic BPF."""
    if platform.machine() not in MACHINES or sys.byteorder != "little":
        raise ValueError(f"the system calls of {platform.machine()} are not known (only x86_64 and aarch64)")
    column, architecture = MACHINES[platform.machine()]

    def when(numbers, *then):
        return [(EQUAL, 0, len(then), numbers[column]), *then]

    def low(argument):
        return (LOAD, 0, 0, ARGUMENTS + 8 * argument)

    def high(argument):
        return (LOAD, 0, 0, ARGUMENTS + 8 * argument + 4)

    def give(answer):
        return (RETURN, 0, 0, answer)

    myself = [low(0), (EQUAL, 1, 0, os.getpid()), give(NOT_PERMITTED), give(ALLOW)]
    program = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), give(KILL_PROCESS), (LOAD, 0, 0, NUMBER)]
    program += [(AT_LEAST, 0, 1, 0x40000000), give(KILL_PROCESS)]  # x32, a second set of numbers for the same calls
    for numbers in SYSTEM_CALLS.values():
        program += when(numbers, give(NOT_PERMITTED)) if numbers[column] is not None else []
    program += when(CLONE3, give(NO_SUCH_CALL))  # its flags cannot be read here; the C library goes on to clone
    program += when(CLONE, low(0), (HAS_BITS, 1, 0, THREAD), give(NOT_PERMITTED), give(ALLOW))
    program += when(KILL, *myself) + when(TGKILL, *myself)
    may_read = [low(2), (EQUAL, 0, 2, 0), high(2), (EQUAL, 1, 0, 0), give(NOT_PERMITTED), give(ALLOW)]
    return program + when(PRLIMIT, *may_read) + [give(ALLOW)]


def run_program(parts, proof, output):
    """Run the parts one after the other as one program; write the proof if the last one's last line was reached."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"], sys.argv = module, ["program"]
    try:
        for name, source in parts:
            exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:  # SystemExit too: who leaves early has not passed
        place = next(reversed(list(program_lines(error))), "before its first line")
        proof = f"{type(error).__name__}: {str(error)[:200]} ({place})".encode(errors="replace")
    os.write(output, proof)
    os._exit(0)


def program_lines(error):
    """The lines of the program that the traceback went through, outermost first."""
    entry = error.__traceback__
    while entry is not None:
        name = entry.tb_frame.f_code.co_filename
        if name.startswith("<part"):
            yield f"{name[1:-1]}, line {entry.tb_lineno}"
        entry = entry.tb_next


class OutOfTime(Exception):
    """A row took longer than it may."""


def run_checks(check, rows, row_s):
    """Each row's result: true, false, null when time or memory were up, or what is wrong with the row as a string."""

    armed = False

    def stop(signum, frame):
        if armed:
            raise OutOfTime

    signal.signal(signal.SIGALRM, stop)
    results = []
    for row in rows:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, row_s)
        try:
            result = check(*row)
            armed = False
        except (OutOfTime, MemoryError):
            result, armed = None, False
        signal.setitimer(signal.ITIMER_REAL, 0)
        results.append(result)
    return results


def serve(check, questions, output, row_s):
    """Say that all is ready, then answer the questions, a line each; one that takes longer ends the process.

    It is the kernel that ends it: a computation in C would not let a handler of Python's in, and what it leaves half
    done is not gone on with.
    """
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    os.write(output, b"null\n")
    for question in questions:
        signal.setitimer(signal.ITIMER_PROF, row_s)
        answer = check(*json.loads(question))
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(output, json.dumps(answer).encode() + b"\n")


def prepare_regex():
    """A check of (text, pattern). Python's `re` looks for signals while it searches, so an alarm stops it."""

    def check(text, pattern):
        try:
            return re.search(pattern, text) is not None
        except re.error as error:
            return f"{pattern!r} is not a regular expression ({error})"

    return check


def prepare_json_schema():
    """A check of (text, schema)."""
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    def refuse(constant):
        raise ValueError(constant)

    def check(text, schema):
        try:
            validator = validator_for(schema)
            validator.check_schema(schema)
        except (SchemaError, re.error) as error:
            return f"is not a JSON schema ({getattr(error, 'message', error)})"
        try:
            value = json.loads(text, parse_constant=refuse)  # NaN and Infinity are not JSON
        except (ValueError, RecursionError):
            return False
        try:
            return validator(schema, registry=Registry()).is_valid(value)
        except Unresolvable as error:
            return f"refers to a schema that is not in it ({error})"
        except RecursionError:
            return False

    return check


def prepare_math():
    """A check of (truth, answer): whether math-verify holds the two expressions for equal; of (truth, None): whether
    it can read the truth. Both are LaTeX. Neither is ever run as code.
    """
    import functools
    import logging

    import sympy
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)  # it warns that it has no time limit of its own: this process has one
    reads = {"extraction_config": [LatexExtractionConfig(boxed_match_priority=0)], "fallback_mode": "no_fallback"}
    no_values = (sympy.nan, sympy.zoo)

    @functools.lru_cache(maxsize=4096)
    def read(text):
        try:
            found = parse(f"\\boxed{{{text}}}", parsing_timeout=None, **reads)
            return [value for value in found if value not in no_values]
        except RecursionError:
            return []

    def check(truth, answer):
        wanted = read(truth)
        if answer is None or not wanted:
            return bool(wanted)
        try:
            found = read(answer)
            if any(isinstance(value, sympy.Symbol) for value in wanted):  # compared as it is written: 1x + 0
                found = [value.doit() if isinstance(value, sympy.Expr) else value for value in found]
            return bool(verify(wanted, found, timeout_seconds=None))
        except RecursionError:
            return False

    return check


if __name__ == "__main__":
    main()
