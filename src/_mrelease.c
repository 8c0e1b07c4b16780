/* mrelease._mrelease: the Python side of the kill.
 *
 * Arguments in, results out, the GIL; nothing else.  The work is done by the
 * plain C files beside this one, which cannot touch Python because they do
 * not include Python.h.
 *
 * The floor of the limited API is 3.12: with 3.11 a module could not be
 * imported in a subinterpreter that has a GIL of its own.  On 3.11 itself,
 * and on free-threaded builds, the module is built for that version alone.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <fcntl.h>              /* F_DUPFD_CLOEXEC */
#include <limits.h>             /* INT_MAX */
#include <poll.h>               /* poll() */
#include <stdbool.h>

#include "locks.h"
#include "probe.h"
#include "procfs.h"
#include "reap.h"
#include "syscalls.h"

#define MODULE_NAME "mrelease._mrelease"
#define MODULE_DOC "The system calls and the kill protocol of mrelease."

/* The state of one module object: one an interpreter. */
typedef struct {
    PyObject *audit;            /* sys.audit: PySys_Audit() is 3.13's */
    PyObject *pidfd_type;
} module_state;

static module_state *
get_state(PyObject *module)
{
    return (module_state *)PyModule_GetState(module);
}

/* The one place that makes an OSError from errno. */
static PyObject *
raise_errno(int err)
{
    errno = err;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* An int in a range, or -1 with an exception set. */
static long long
as_number(PyObject *object, const char *name, long long low, long long high)
{
    int overflow = 0;
    long long value = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (value == -1 && PyErr_Occurred()) {
        return -1;
    }
    if (overflow != 0 || value < low || value > high) {
        PyErr_Format(PyExc_OverflowError, "%s must be from %lld to %lld", name,
                     low, high);
        return -1;
    }
    return value;
}

/* An int (whatever its value: the kernel judges it) or an object with a
 * fileno() method; -1 with an exception set otherwise.
 */
static int
as_fd(PyObject *object)
{
    if (PyBool_Check(object)) {
        PyErr_SetString(PyExc_TypeError,
                        "pidfd must be an int or an object with a fileno() "
                        "method, not bool");
        return -1;
    }
    if (PyLong_Check(object)) {
        return (int)as_number(object, "pidfd", INT_MIN, INT_MAX);
    }
    return PyObject_AsFileDescriptor(object);
}

PyDoc_STRVAR(process_mrelease_doc,
"process_mrelease($module, pidfd, flags=0, /)\n"
"--\n"
"\n"
"Release the memory of a dying process: the system call, and nothing more.\n"
"\n"
"pidfd is an int or an object with fileno() (a Victim, say).  flags are\n"
"passed to the kernel as they are; it knows none yet and refuses all but 0.\n"
"\n"
"The memory is freed by the calling thread, on its CPUs and at its priority.\n"
"The GIL is not held meanwhile.  The call has no time limit: it waits as\n"
"long as the victim holds its mmap_lock for writing.\n"
"\n"
"Raises OSError by errno (process_mrelease(2), Linux 5.15):\n"
"  EBADF   pidfd is not an open pidfd\n"
"  EINVAL  flags is not 0; or the process is not dying, writes a core dump,\n"
"          or shares its memory with a process that is not dying\n"
"  ESRCH   ProcessLookupError: the process has ended, or it is so far on its\n"
"          way out that its memory is out of reach, even if still held\n"
"  EAGAIN  BlockingIOError: part of the memory could not be released now\n"
"  ENOSYS  the kernel has no such call, or a seccomp policy hides it\n"
"  EPERM   PermissionError: a seccomp policy forbids it; the call itself\n"
"          asks for no permission\n"
"EINTR is retried after the signal handlers have run (PEP 475).");

static PyObject *
process_mrelease(PyObject *Py_UNUSED(module), PyObject *const *args,
                 Py_ssize_t nargs)
{
    unsigned int flags = 0;
    int rc;
    int err;

    if (nargs < 1 || nargs > 2) {
        return PyErr_Format(PyExc_TypeError,
                            "process_mrelease expected 1 or 2 arguments, "
                            "got %zd",
                            nargs);
    }
    int pidfd = as_fd(args[0]);
    if (pidfd == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (nargs == 2) {
        long long value = as_number(args[1], "flags", 0, UINT_MAX);
        if (value == -1) {
            return NULL;
        }
        flags = (unsigned int)value;
    }
    for (;;) {
        Py_BEGIN_ALLOW_THREADS
        rc = sys_process_mrelease(pidfd, flags);
        err = errno;
        Py_END_ALLOW_THREADS
        if (rc == 0) {
            Py_RETURN_NONE;
        }
        if (err != EINTR) {
            return raise_errno(err);
        }
        if (PyErr_CheckSignals() < 0) {
            return NULL;
        }
    }
}

/* A pidfd that is closed when nobody refers to it any more.
 *
 * The number of a closed file descriptor is soon another file's, and who still
 * meant to kill through it would hit a stranger.  So a call holds a reference:
 * what closes a Victim in one thread drops the Victim's, not the call's.
 */
struct pidfd {
    int fd;
};

#if PY_VERSION_HEX >= 0x030c0000
/* PEP 697: the stable ABI of free-threaded Python hides PyObject. */
#  define PIDFD_SIZE (-(int)sizeof(struct pidfd))

static struct pidfd *
pidfd_of(PyObject *self)
{
    return (struct pidfd *)PyObject_GetTypeData(self, Py_TYPE(self));
}
#else
struct pidfd_object {
    PyObject_HEAD struct pidfd pidfd;
};
#  define PIDFD_SIZE ((int)sizeof(struct pidfd_object))

static struct pidfd *
pidfd_of(PyObject *self)
{
    return &((struct pidfd_object *)self)->pidfd;
}
#endif

/* Takes over the fd, also when it fails. */
static PyObject *
pidfd_new(PyObject *module, int fd)
{
    PyTypeObject *type = (PyTypeObject *)get_state(module)->pidfd_type;
    PyObject *self = PyType_GenericAlloc(type, 0);
    if (self == NULL) {
        close(fd);
        return NULL;
    }
    pidfd_of(self)->fd = fd;
    return self;
}

PyDoc_STRVAR(pidfd_fileno_doc,
"fileno($self, /)\n"
"--\n"
"\n"
"The file descriptor.  Raises ValueError after close().");

static PyObject *
pidfd_fileno(PyObject *self, PyObject *Py_UNUSED(args))
{
    int fd = pidfd_of(self)->fd;
    if (fd < 0) {
        PyErr_SetString(PyExc_ValueError, "this pidfd is closed");
        return NULL;
    }
    return PyLong_FromLong(fd);
}

PyDoc_STRVAR(pidfd_close_doc,
"close($self, /)\n"
"--\n"
"\n"
"Close it now.  For who knows that nobody else uses it.");

static PyObject *
pidfd_close(PyObject *self, PyObject *Py_UNUSED(args))
{
    int fd = pidfd_of(self)->fd;
    pidfd_of(self)->fd = -1;
    if (fd >= 0) {
        close(fd);
    }
    Py_RETURN_NONE;
}

static void
pidfd_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_self = (freefunc)PyType_GetSlot(type, Py_tp_free);
    int fd = pidfd_of(self)->fd;
    if (fd >= 0) {
        close(fd);
    }
    free_self(self);
    Py_DECREF(type);
}

static PyMethodDef pidfd_methods[] = {
    {"fileno", pidfd_fileno, METH_NOARGS, pidfd_fileno_doc},
    {"close", pidfd_close, METH_NOARGS, pidfd_close_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot pidfd_slots[] = {
    {Py_tp_doc, "A pidfd, closed when nobody refers to it any more."},
    {Py_tp_dealloc, (void *)(uintptr_t)pidfd_dealloc},
    {Py_tp_methods, pidfd_methods},
    {0, NULL},
};

static PyType_Spec pidfd_spec = {
    .name = MODULE_NAME ".Pidfd",
    .basicsize = PIDFD_SIZE,
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION |
             Py_TPFLAGS_IMMUTABLETYPE,
    .slots = pidfd_slots,
};

PyDoc_STRVAR(pidfd_open_doc,
"pidfd_open($module, pid, /)\n"
"--\n"
"\n"
"A new Pidfd for the process: pidfd_open(2), Linux 5.3.\n"
"\n"
"Not os.pidfd_open(), which a Python that was built on an old system lacks.\n"
"Raises OSError by errno.");

static PyObject *
pidfd_open(PyObject *module, PyObject *arg)
{
    long long pid = as_number(arg, "pid", 1, INT_MAX);
    if (pid == -1) {
        return NULL;
    }
    int fd = sys_pidfd_open((pid_t)pid);
    return fd < 0 ? raise_errno(errno) : pidfd_new(module, fd);
}

PyDoc_STRVAR(pidfd_dup_doc,
"pidfd_dup($module, pidfd, /)\n"
"--\n"
"\n"
"A new Pidfd for the process of an open one, given by number or object.\n"
"\n"
"Raises OSError by errno; what kind of file it is is not looked at.");

static PyObject *
pidfd_dup(PyObject *module, PyObject *arg)
{
    int given = as_fd(arg);
    if (given == -1 && PyErr_Occurred()) {
        return NULL;
    }
    int fd = fcntl(given, F_DUPFD_CLOEXEC, 0);
    return fd < 0 ? raise_errno(errno) : pidfd_new(module, fd);
}

PyDoc_STRVAR(pidfd_state_doc,
"pidfd_state($module, pidfd, /)\n"
"--\n"
"\n"
"'running', 'ended' (the whole thread group has) or 'reaped' (and it was\n"
"waited for: its pid is free).  Raises OSError by errno.");

static PyObject *
pidfd_state(PyObject *Py_UNUSED(module), PyObject *arg)
{
    int pidfd = as_fd(arg);
    if (pidfd == -1 && PyErr_Occurred()) {
        return NULL;
    }
    /* Signal 0 to a zombie succeeds, to a reaped process it does not. */
    if (sys_pidfd_send_signal(pidfd, 0) < 0) {
        if (errno == ESRCH) {
            return PyUnicode_FromString("reaped");
        }
        if (errno == EBADF) {
            return raise_errno(EBADF);
        }
    }
    struct pollfd fd = {.fd = pidfd, .events = POLLIN};
    if (poll(&fd, 1, 0) < 0) {
        return raise_errno(errno);
    }
    return PyUnicode_FromString(fd.revents & POLLIN ? "ended" : "running");
}

static PyObject *
footprint_tuple(const struct procfs_status *status)
{
    return Py_BuildValue("(LLLLL)", (long long)status->anon,
                         (long long)status->file, (long long)status->shmem,
                         (long long)status->swap, (long long)status->hugetlb);
}

PyDoc_STRVAR(proc_is_ours_doc,
"proc_is_ours($module, /)\n"
"--\n"
"\n"
"Whether /proc is mounted and is the one of the caller's pid namespace.");

static PyObject *
proc_is_ours(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    return PyBool_FromLong(procfs_is_ours());
}

PyDoc_STRVAR(read_footprint_doc,
"read_footprint($module, pid, /)\n"
"--\n"
"\n"
"(tgid, (anon, file, shmem, swap, hugetlb)) of /proc/PID/status, in bytes.\n"
"\n"
"Raises OSError by errno.");

static PyObject *
read_footprint(PyObject *Py_UNUSED(module), PyObject *arg)
{
    struct procfs_status status;
    long long pid = as_number(arg, "pid", 1, INT_MAX);
    if (pid == -1) {
        return NULL;
    }
    int err;
    Py_BEGIN_ALLOW_THREADS
    err = procfs_read_status((pid_t)pid, &status);
    Py_END_ALLOW_THREADS
    if (err != 0) {
        return raise_errno(err);
    }
    return Py_BuildValue("(iN)", (int)status.tgid, footprint_tuple(&status));
}

PyDoc_STRVAR(read_stat_doc,
"read_stat($module, pid, /)\n"
"--\n"
"\n"
"(started, kernel_thread) of /proc/PID/stat: clock ticks since boot, a bool.\n"
"\n"
"Raises OSError by errno.");

static PyObject *
read_stat(PyObject *Py_UNUSED(module), PyObject *arg)
{
    struct procfs_stat stat;
    long long pid = as_number(arg, "pid", 1, INT_MAX);
    if (pid == -1) {
        return NULL;
    }
    int err;
    Py_BEGIN_ALLOW_THREADS
    err = procfs_read_stat((pid_t)pid, &stat);
    Py_END_ALLOW_THREADS
    if (err != 0) {
        return raise_errno(err);
    }
    return Py_BuildValue("(LO)", (long long)stat.started,
                         stat.kernel_thread ? Py_True : Py_False);
}

static const char *const lock_names[] = {
    [LOCKS_FREE] = "free",
    [LOCKS_HELD] = "held",
    [LOCKS_UNKNOWN] = "unknown",
};

PyDoc_STRVAR(look_at_locks_doc,
"look_at_locks($module, pid, /)\n"
"--\n"
"\n"
"Does any thread of the process hold a robust lock?\n"
"\n"
"'free', 'held', or 'unknown' (not permitted to look).  Drops the GIL: it\n"
"may wait for the victim's mmap_lock.");

static PyObject *
look_at_locks(PyObject *Py_UNUSED(module), PyObject *arg)
{
    enum locks locks;
    bool no_fd;
    long long pid = as_number(arg, "pid", 1, INT_MAX);
    if (pid == -1) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    locks = locks_look((pid_t)pid, 0, &no_fd);
    Py_END_ALLOW_THREADS
    return PyUnicode_FromString(lock_names[locks]);
}

/* Seconds since the call began, or None for what did not happen. */
static PyObject *
since(const struct reap *reap, int64_t when)
{
    if (when == 0) {
        Py_RETURN_NONE;
    }
    return PyFloat_FromDouble((double)(when - reap->begun) / 1e9);
}

static PyObject *
reap_tuple(const struct reap *reap)
{
    static const char *const outcome_names[] = {
        [REAP_RELEASED] = "released",
        [REAP_EXITED] = "exited",
        [REAP_EXITING] = "exiting",
        [REAP_PARTIAL] = "partial",
        [REAP_SHARED] = "shared",
        [REAP_DUMPING] = "dumping",
        [REAP_ALIVE] = "alive",
        [REAP_LOCKED] = "locked",
        [REAP_UNSUPPORTED] = "unsupported",
    };
    PyObject *footprint = NULL;
    if (reap->has_footprint) {
        footprint = footprint_tuple(&reap->before);
        if (footprint == NULL) {
            return NULL;
        }
    }
    /* "N" of a NULL makes the whole NULL, with its exception set. */
    PyObject *result = Py_BuildValue(
        "(sOONNNNiisO)", outcome_names[reap->outcome],
        reap->freed ? Py_True : Py_False,
        footprint == NULL ? Py_None : footprint, since(reap, reap->terminated),
        since(reap, reap->signalled), since(reap, reap->released),
        since(reap, reap->exited), reap->err, reap->attempts,
        reap->protect ? lock_names[reap->locks] : "ignored",
        reap->raised ? Py_True : Py_False);
    Py_XDECREF(footprint);
    return result;
}

PyDoc_STRVAR(reap_doc,
"reap($module, pidfd, pid, begun, grace, timeout, escalate, locks, send, /)\n"
"--\n"
"\n"
"The kill protocol for one pidfd, in the calling thread, without the GIL.\n"
"\n"
"begun is a time, grace and timeout are durations, all in nanoseconds of\n"
"time.monotonic_ns(); escalate is a file descriptor or -1; locks: look at\n"
"them, and withhold the release if any are held; send: kill (else only\n"
"release).\n"
"\n"
"Returns an errno if nothing was sent (-1: it is a kernel thread), else\n"
"(outcome, freed, footprint, terminated, signalled, released, exited, errno,\n"
"attempts, locks, raised), times in seconds since begun or None.\n"
"\n"
"Raises the audit event mrelease.kill with argument pid before a signal, and\n"
"what a signal handler of the caller's raises during a wait; the process has\n"
"been sent SIGKILL all the same, if it was to be killed.");

static PyObject *
reap(PyObject *module, PyObject *args)
{
    struct reap job = {.memory = -1};
    long long begun;
    long long grace;
    long long timeout;
    int protect;
    int send;
    enum reap_progress progress;

    if (!PyArg_ParseTuple(args, "iiLLLipp:reap", &job.pidfd, &job.pid, &begun,
                          &grace, &timeout, &job.escalate_fd, &protect, &send))
    {
        return NULL;
    }
    job.begun = begun;
    job.grace = grace;
    job.timeout = timeout;
    job.protect = protect != 0;
    job.send = send != 0;
    if (job.send) {
        PyObject *heard = PyObject_CallFunction(get_state(module)->audit, "si",
                                                "mrelease.kill", job.pid);
        if (heard == NULL) {
            return NULL;
        }
        Py_DECREF(heard);
    }
    for (;;) {
        Py_BEGIN_ALLOW_THREADS
        progress = reap_run(&job);
        Py_END_ALLOW_THREADS
        if (progress != REAP_PAUSED) {
            reap_finish(&job);
            return progress == REAP_DONE ? reap_tuple(&job)
                                         : PyLong_FromLong(job.refused);
        }
        if (PyErr_CheckSignals() < 0) {
            break;
        }
    }
    /* The handler wants out of the wait.  Whoever asked for a kill gets it. */
    if (job.send && job.signalled == 0) {
        reap_hurry(&job);
        Py_BEGIN_ALLOW_THREADS
        reap_run(&job);
        Py_END_ALLOW_THREADS
    }
    reap_finish(&job);
    return NULL;
}

PyDoc_STRVAR(probe_doc,
"probe($module, in_child, /)\n"
"--\n"
"\n"
"Make each system call that a kill needs, harmlessly: {name: result}.\n"
"\n"
"0: it works; an errno; -1: the caller of this one is killed (seen only from\n"
"a child); -2: no child could be made.");

static PyObject *
probe(PyObject *Py_UNUSED(module), PyObject *arg)
{
    int results[PROBE_CALLS];
    int in_child = PyObject_IsTrue(arg);
    if (in_child < 0) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    probe_calls(in_child != 0, results);
    Py_END_ALLOW_THREADS

    PyObject *found = PyDict_New();
    for (int i = 0; found != NULL && i < PROBE_CALLS; i++) {
        PyObject *result = PyLong_FromLong(results[i]);
        if (result == NULL ||
            PyDict_SetItemString(found, probe_names[i], result) < 0)
        {
            Py_CLEAR(found);
        }
        Py_XDECREF(result);
    }
    return found;
}

static PyMethodDef methods[] = {
    {"process_mrelease", (PyCFunction)(void (*)(void))process_mrelease,
     METH_FASTCALL, process_mrelease_doc},
    {"pidfd_open", pidfd_open, METH_O, pidfd_open_doc},
    {"pidfd_dup", pidfd_dup, METH_O, pidfd_dup_doc},
    {"pidfd_state", pidfd_state, METH_O, pidfd_state_doc},
    {"proc_is_ours", proc_is_ours, METH_NOARGS, proc_is_ours_doc},
    {"read_footprint", read_footprint, METH_O, read_footprint_doc},
    {"read_stat", read_stat, METH_O, read_stat_doc},
    {"look_at_locks", look_at_locks, METH_O, look_at_locks_doc},
    {"reap", reap, METH_VARARGS, reap_doc},
    {"probe", probe, METH_O, probe_doc},
    {NULL, NULL, 0, NULL},
};

static int
module_exec(PyObject *module)
{
    module_state *state = get_state(module);
    PyObject *sys = PyImport_ImportModule("sys");
    if (sys == NULL) {
        return -1;
    }
    state->audit = PyObject_GetAttrString(sys, "audit");
    Py_DECREF(sys);
    if (state->audit == NULL) {
        return -1;
    }
    state->pidfd_type = PyType_FromModuleAndSpec(module, &pidfd_spec, NULL);
    if (state->pidfd_type == NULL) {
        return -1;
    }
    return PyModule_AddType(module, (PyTypeObject *)state->pidfd_type);
}

static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    Py_VISIT(get_state(module)->audit);
    Py_VISIT(get_state(module)->pidfd_type);
    return 0;
}

static int
module_clear(PyObject *module)
{
    Py_CLEAR(get_state(module)->audit);
    Py_CLEAR(get_state(module)->pidfd_type);
    return 0;
}

static void
module_free(void *module)
{
    module_clear((PyObject *)module);
}

/* All state is in the module object: the C files have none.  It is written
 * once, by exec, before anybody can call; what a call works on is on its own
 * stack.  So each interpreter may have its own GIL, or there may be none.
 */
#ifdef Py_TARGET_ABI3T
/* The stable ABI of free-threaded Python (PEP 803) knows no PyModuleDef. */
PyABIInfo_VAR(abi_info);

static PySlot slots[] = {
    PySlot_STATIC_DATA(Py_mod_abi, &abi_info),
    PySlot_STATIC_DATA(Py_mod_name, (char *)MODULE_NAME),
    PySlot_STATIC_DATA(Py_mod_doc, (char *)MODULE_DOC),
    PySlot_SIZE(Py_mod_state_size, sizeof(module_state)),
    PySlot_STATIC_DATA(Py_mod_methods, methods),
    PySlot_FUNC(Py_mod_exec, module_exec),
    PySlot_FUNC(Py_mod_state_traverse, module_traverse),
    PySlot_FUNC(Py_mod_state_clear, module_clear),
    PySlot_FUNC(Py_mod_state_free, module_free),
    PySlot_DATA(Py_mod_multiple_interpreters,
                Py_MOD_PER_INTERPRETER_GIL_SUPPORTED),
    PySlot_DATA(Py_mod_gil, Py_MOD_GIL_NOT_USED),
    PySlot_END,
};

PyMODEXPORT_FUNC
PyModExport__mrelease(void)
{
    return slots;
}
#else
static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)(uintptr_t)module_exec},
#  ifdef Py_MOD_PER_INTERPRETER_GIL_SUPPORTED
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#  endif
#  ifdef Py_MOD_GIL_NOT_USED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#  endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,         .m_name = MODULE_NAME,
    .m_doc = MODULE_DOC,           .m_size = sizeof(module_state),
    .m_methods = methods,          .m_slots = slots,
    .m_traverse = module_traverse, .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC
PyInit__mrelease(void)
{
    return PyModuleDef_Init(&definition);
}
#endif
