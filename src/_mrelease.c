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
#include <stdint.h>             /* uint64_t */
#include <string.h>             /* strchr() */
#include <sys/vfs.h>            /* fstatfs() */

#include "child.h"
#include "harden.h"
#include "locks.h"
#include "pool.h"
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
    PyObject *job_type;
    PyObject *pool_type;
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

/* What an object of ours stands for. */
union handle {
    int fd;
    struct job *job;
    struct pool *pool;
};

#if PY_VERSION_HEX >= 0x030c0000
/* PEP 697: the stable ABI of free-threaded Python hides PyObject. */
#  define HANDLE_SIZE (-(int)sizeof(union handle))

static union handle *
handle_of(PyObject *self)
{
    return (union handle *)PyObject_GetTypeData(self, Py_TYPE(self));
}
#else
struct handle_object {
    PyObject_HEAD union handle handle;
};
#  define HANDLE_SIZE ((int)sizeof(struct handle_object))

static union handle *
handle_of(PyObject *self)
{
    return &((struct handle_object *)self)->handle;
}
#endif

/* An object that has no handle yet. */
static PyObject *
handle_new(PyObject *type)
{
    return PyType_GenericAlloc((PyTypeObject *)type, 0);
}

static void
handle_free(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_self = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_self(self);
    Py_DECREF(type);
}

/* A pidfd that is closed when nobody refers to it any more.
 *
 * The number of a closed file descriptor is soon another file's, and who still
 * meant to kill through it would hit a stranger.  So a call holds a reference:
 * what closes a Victim in one thread drops the Victim's, not the call's.
 *
 * Takes over the fd, also when it fails.
 */
static PyObject *
pidfd_new(PyObject *module, int fd)
{
    PyObject *self = handle_new(get_state(module)->pidfd_type);
    if (self == NULL) {
        close(fd);
        return NULL;
    }
    handle_of(self)->fd = fd;
    return self;
}

/* The file descriptor.  Raises ValueError after close(). */
PyDoc_STRVAR(pidfd_fileno_doc, "fileno($self, /)\n--\n\n");

static PyObject *
pidfd_fileno(PyObject *self, PyObject *Py_UNUSED(args))
{
    int fd = handle_of(self)->fd;
    if (fd < 0) {
        PyErr_SetString(PyExc_ValueError, "this pidfd is closed");
        return NULL;
    }
    return PyLong_FromLong(fd);
}

/* Close it now.  For who knows that nobody else uses it. */
PyDoc_STRVAR(pidfd_close_doc, "close($self, /)\n--\n\n");

static PyObject *
pidfd_close(PyObject *self, PyObject *Py_UNUSED(args))
{
    int fd = handle_of(self)->fd;
    handle_of(self)->fd = -1;
    if (fd >= 0) {
        close(fd);
    }
    Py_RETURN_NONE;
}

static void
pidfd_dealloc(PyObject *self)
{
    int fd = handle_of(self)->fd;
    if (fd >= 0) {
        close(fd);
    }
    handle_free(self);
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
    .basicsize = HANDLE_SIZE,
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION |
             Py_TPFLAGS_IMMUTABLETYPE,
    .slots = pidfd_slots,
};

/* A new Pidfd for the process: pidfd_open(2), Linux 5.3.
 *
 * Not os.pidfd_open(), which a Python that was built on an old system lacks.
 * Raises OSError by errno.
 */
PyDoc_STRVAR(pidfd_open_doc, "pidfd_open($module, pid, /)\n--\n\n");

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

/* A new Pidfd for the process of an open one, given by number or object.
 *
 * Raises OSError by errno; what kind of file it is is not looked at.
 */
PyDoc_STRVAR(pidfd_dup_doc, "pidfd_dup($module, pidfd, /)\n--\n\n");

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

/* 'running', 'ended' (the whole thread group has) or 'reaped' (and it was
 * waited for: its pid is free).  Raises OSError by errno.
 */
PyDoc_STRVAR(pidfd_state_doc, "pidfd_state($module, pidfd, /)\n--\n\n");

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

/* Send a signal to the process of a pidfd: pidfd_send_signal(2), Linux 5.1.
 *
 * With group, to the process group that it leads or led: Linux 6.9, EINVAL
 * before that.
 *
 * Not signal.pidfd_send_signal(), which a Python that was built on an old
 * system lacks.  Raises OSError by errno.
 */
PyDoc_STRVAR(pidfd_signal_doc,
             "pidfd_signal($module, pidfd, signum, group=False, /)\n--\n\n");

static PyObject *
pidfd_signal(PyObject *Py_UNUSED(module), PyObject *const *args,
             Py_ssize_t nargs)
{
    if (nargs < 2 || nargs > 3) {
        return PyErr_Format(PyExc_TypeError,
                            "pidfd_signal expected 2 or 3 arguments, got %zd",
                            nargs);
    }
    int pidfd = as_fd(args[0]);
    if (pidfd == -1 && PyErr_Occurred()) {
        return NULL;
    }
    long long signum = as_number(args[1], "signum", 0, INT_MAX);
    if (signum == -1) {
        return NULL;
    }
    int group = nargs > 2 ? PyObject_IsTrue(args[2]) : 0;
    if (group < 0) {
        return NULL;
    }
    if ((group ? sys_pidfd_signal_group(pidfd, (int)signum)
               : sys_pidfd_send_signal(pidfd, (int)signum)) < 0)
    {
        return raise_errno(errno);
    }
    Py_RETURN_NONE;
}

/* What kind of file system a file is on: f_type of statfs(2).
 *
 * os.fstatvfs() does not tell.  Raises OSError by errno.
 */
PyDoc_STRVAR(file_system_doc, "file_system($module, fd, /)\n--\n\n");

static PyObject *
file_system(PyObject *Py_UNUSED(module), PyObject *arg)
{
    struct statfs found;
    int fd = PyObject_AsFileDescriptor(arg);
    if (fd == -1) {
        return NULL;
    }
    if (fstatfs(fd, &found) < 0) {
        return raise_errno(errno);
    }
    /* 32 bits, but its type is signed on some architectures. */
    return PyLong_FromUnsignedLong((uint32_t)found.f_type);
}

/* Open what lies in a directory itself: (openat2(2), Linux 5.6)
 *
 * no link (ELOOP), nothing that is mounted there (EXDEV), no path (EINVAL).
 * Without openat2() what is mounted there is not seen.  Raises OSError by
 * errno.
 */
PyDoc_STRVAR(open_inside_doc,
             "open_inside($module, at, name, flags, /)\n--\n\n");

static PyObject *
open_inside(PyObject *Py_UNUSED(module), PyObject *args)
{
    int at;
    int flags;
    PyObject *name;
    if (!PyArg_ParseTuple(args, "iO&i", &at, PyUnicode_FSConverter, &name,
                          &flags))
    {
        return NULL;
    }
    const char *file = PyBytes_AsString(name);
    if (file == NULL || strchr(file, '/') != NULL || strcmp(file, "..") == 0) {
        Py_DECREF(name);
        return file == NULL ? NULL : raise_errno(EINVAL);
    }
    flags |= O_CLOEXEC | O_NOFOLLOW;
    struct sys_open_how how = {
        .flags = (uint64_t)flags,
        .resolve = SYS_RESOLVE_NO_XDEV | SYS_RESOLVE_NO_MAGICLINKS |
                   SYS_RESOLVE_NO_SYMLINKS | SYS_RESOLVE_BENEATH,
    };
    int fd;
    int err;
    Py_BEGIN_ALLOW_THREADS
    fd = sys_openat2(at, file, &how);
    if (fd < 0 && (errno == ENOSYS || errno == EPERM)) {
        /* Older, or a seccomp policy that does not know it. */
        fd = openat(at, file, flags);
    }
    err = errno;
    Py_END_ALLOW_THREADS
    Py_DECREF(name);
    if (fd < 0) {
        errno = err;
        return PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError,
                                                    PyTuple_GetItem(args, 1));
    }
    return PyLong_FromLong(fd);
}

static PyObject *
footprint_tuple(const struct procfs_status *status)
{
    return Py_BuildValue("(LLLLL)", (long long)status->anon,
                         (long long)status->file, (long long)status->shmem,
                         (long long)status->swap, (long long)status->hugetlb);
}

/* Whether /proc is mounted and is the one of the caller's pid namespace. */
PyDoc_STRVAR(proc_is_ours_doc, "proc_is_ours($module, /)\n--\n\n");

static PyObject *
proc_is_ours(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    return PyBool_FromLong(procfs_is_ours());
}

/* (tgid, (anon, file, shmem, swap, hugetlb)) of /proc/PID/status, in bytes.
 *
 * Raises OSError by errno.
 */
PyDoc_STRVAR(read_footprint_doc, "read_footprint($module, pid, /)\n--\n\n");

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

/* (started, kernel_thread) of /proc/PID/stat: clock ticks since boot, a bool.
 *
 * Raises OSError by errno; EBUSY where is_in_exec() says so.
 */
PyDoc_STRVAR(read_stat_doc, "read_stat($module, pid, /)\n--\n\n");

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

/* Is it in the middle of execve(2), for more than 2 ms?  Until it is through,
 * who reads its stat or asks for its robust lists may have to wait.
 */
PyDoc_STRVAR(is_in_exec_doc, "is_in_exec($module, pid, /)\n--\n\n");

static PyObject *
is_in_exec(PyObject *Py_UNUSED(module), PyObject *arg)
{
    bool found;
    long long pid = as_number(arg, "pid", 1, INT_MAX);
    if (pid == -1) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    found = procfs_is_in_exec((pid_t)pid, true);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(found);
}

static const char *const lock_names[] = {
    [LOCKS_FREE] = "free",
    [LOCKS_HELD] = "held",
    [LOCKS_UNKNOWN] = "unknown",
};

/* Does any thread of the process hold a robust lock?
 *
 * 'free', 'held', or 'unknown' (not permitted to look).  Drops the GIL: it
 * may wait for the victim's mmap_lock.
 */
PyDoc_STRVAR(look_at_locks_doc, "look_at_locks($module, pid, /)\n--\n\n");

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
    locks = procfs_is_in_exec((pid_t)pid, true)
                ? LOCKS_FREE
                : locks_look((pid_t)pid, false, &no_fd);
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

/* The kill protocol for one pidfd, in the calling thread, without the GIL.
 *
 * begun is a time, grace and timeout are durations, all in nanoseconds of
 * time.monotonic_ns(); escalate is a file descriptor or -1; locks: look at
 * them, and withhold the release if any are held; send: kill (else only
 * release).
 *
 * Returns an errno if nothing was sent (-1: it is a kernel thread), else
 * (outcome, freed, footprint, terminated, signalled, released, exited, errno,
 * attempts, locks, raised), times in seconds since begun or None.
 *
 * Raises the audit event mrelease.kill with argument pid before a signal, and
 * what a signal handler of the caller's raises during a wait; the process has
 * been sent SIGKILL all the same, if it was to be killed.
 */
PyDoc_STRVAR(reap_doc,
"reap($module, pidfd, pid, begun, grace, timeout, escalate, locks, send, /)\n"
"--\n\n");

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

/* So often, at least, does a wait look at the caller's signals. */
#define LOOK_AT_SIGNALS INT64_C(50000000)

/* A job of a pool: the kill of one victim. */

/* An eventfd that can be read once the job is done.  It is the job's. */
PyDoc_STRVAR(job_fileno_doc, "fileno($self, /)\n--\n\n");

static PyObject *
job_fileno(PyObject *self, PyObject *Py_UNUSED(args))
{
    return PyLong_FromLong(job_fd(handle_of(self)->job));
}

/* Whether there is a result, or a refusal. */
PyDoc_STRVAR(job_done_doc, "done($self, /)\n--\n\n");

static PyObject *
job_done(PyObject *self, PyObject *Py_UNUSED(args))
{
    return PyBool_FromLong(job_is_done(handle_of(self)->job));
}

/* Wait for the result, for so many nanoseconds (-1: for ever), without the
 * GIL.  Whether it is there.  Raises what a signal handler raises.
 */
PyDoc_STRVAR(job_wait_doc, "wait($self, timeout, /)\n--\n\n");

static PyObject *
job_wait(PyObject *self, PyObject *arg)
{
    struct job *job = handle_of(self)->job;
    long long timeout = as_number(arg, "timeout", -1, LLONG_MAX);
    if (timeout == -1 && PyErr_Occurred()) {
        return NULL;
    }
    int64_t now = reap_now();
    int64_t until =
        timeout < 0 || timeout > INT64_MAX - now ? INT64_MAX : now + timeout;
    while (!job_is_done(job)) {
        int64_t left = until - reap_now();
        if (left <= 0) {
            Py_RETURN_FALSE;
        }
        /* One that comes before the wait does not end it. */
        struct timespec time = {
            .tv_nsec = (long)(left < LOOK_AT_SIGNALS ? left : LOOK_AT_SIGNALS),
        };
        struct pollfd fd = {.fd = job_fd(job), .events = POLLIN};
        Py_BEGIN_ALLOW_THREADS
        ppoll(&fd, 1, &time, NULL);
        Py_END_ALLOW_THREADS
        if (PyErr_CheckSignals() < 0) {
            return NULL;
        }
    }
    Py_RETURN_TRUE;
}

/* What reap() returns.  Raises ValueError if the job is not done. */
PyDoc_STRVAR(job_result_doc, "result($self, /)\n--\n\n");

static PyObject *
job_result_method(PyObject *self, PyObject *Py_UNUSED(args))
{
    struct job *job = handle_of(self)->job;
    if (!job_is_done(job)) {
        PyErr_SetString(PyExc_ValueError, "the job is not done");
        return NULL;
    }
    int refused = job_refused(job);
    return refused != 0 ? PyLong_FromLong(refused)
                        : reap_tuple(job_result(job));
}

/* When the call of process_mrelease(2) began that freed the memory or came
 * too late: seconds since the call for the job, or None.  Once it is done.
 */
PyDoc_STRVAR(job_entered_doc, "entered($self, /)\n--\n\n");

static PyObject *
job_entered_method(PyObject *self, PyObject *Py_UNUSED(args))
{
    struct job *job = handle_of(self)->job;
    if (!job_is_done(job)) {
        Py_RETURN_NONE;
    }
    return since(job_result(job), job_entered(job));
}

static void
job_dealloc(PyObject *self)
{
    if (handle_of(self)->job != NULL) {
        job_release(handle_of(self)->job);
    }
    handle_free(self);
}

static PyMethodDef job_methods[] = {
    {"fileno", job_fileno, METH_NOARGS, job_fileno_doc},
    {"done", job_done, METH_NOARGS, job_done_doc},
    {"wait", job_wait, METH_O, job_wait_doc},
    {"result", job_result_method, METH_NOARGS, job_result_doc},
    {"entered", job_entered_method, METH_NOARGS, job_entered_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot job_slots[] = {
    {Py_tp_doc, "The kill of one victim by a Pool."},
    {Py_tp_dealloc, (void *)(uintptr_t)job_dealloc},
    {Py_tp_methods, job_methods},
    {0, NULL},
};

static PyType_Spec job_spec = {
    .name = MODULE_NAME ".Job",
    .basicsize = HANDLE_SIZE,
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION |
             Py_TPFLAGS_IMMUTABLETYPE,
    .slots = job_slots,
};

/* A pool of native threads. */

static const char *const pool_states[] = {
    [POOL_OPEN] = "open",
    [POOL_CLOSED] = "closed",
    [POOL_FORKED] = "forked",
};

/* 'open', 'closed', or 'forked': its threads are those of another process. */
PyDoc_STRVAR(pool_state_doc, "state($self, /)\n--\n\n");

static PyObject *
pool_state_method(PyObject *self, PyObject *Py_UNUSED(args))
{
    return PyUnicode_FromString(
        pool_states[pool_state(handle_of(self)->pool)]);
}

/* A Job for submit(); the arguments are those of reap().
 *
 * Nothing happens to the process yet.  Raises OSError for want of memory or
 * of file descriptors; it takes two, three with escalate.
 */
PyDoc_STRVAR(job_new_doc,
"job_new($module, pidfd, pid, begun, grace, timeout, escalate, locks, /)\n"
"--\n\n");

static PyObject *
job_new(PyObject *module, PyObject *args)
{
    struct reap asked = {.memory = -1, .send = true};
    long long begun;
    long long grace;
    long long timeout;
    int protect;

    if (!PyArg_ParseTuple(args, "iiLLLip:job_new", &asked.pidfd, &asked.pid,
                          &begun, &grace, &timeout, &asked.escalate_fd,
                          &protect))
    {
        return NULL;
    }
    asked.begun = begun;
    asked.grace = grace;
    asked.timeout = timeout;
    asked.protect = protect != 0;
    PyObject *self = handle_new(get_state(module)->job_type);
    if (self == NULL) {
        return NULL;
    }
    int err = job_make(&asked, &handle_of(self)->job);
    if (err != 0) {
        Py_DECREF(self);
        return raise_errno(err);
    }
    return self;
}

/* Kill the victims of a list of Jobs, each of which is new: the biggest first.
 *
 * When it returns SIGTERM or SIGKILL has been sent to all.  'open', or why the
 * pool took none: see Pool.state().  Raises the audit event mrelease.kill with
 * argument pid for each, before the first signal.
 */
PyDoc_STRVAR(pool_submit_doc, "submit($module, pool, jobs, /)\n--\n\n");

static PyObject *
pool_submit_function(PyObject *module, PyObject *args)
{
    module_state *state = get_state(module);
    PyObject *pool;
    PyObject *list;

    if (!PyArg_ParseTuple(args, "O!O!:submit", state->pool_type, &pool,
                          &PyList_Type, &list))
    {
        return NULL;
    }
    Py_ssize_t count = PyList_Size(list);
    if (count > INT_MAX) {
        return raise_errno(ENOMEM);
    }
    struct job **jobs = PyMem_Calloc((size_t)count + 1, sizeof(*jobs));
    if (jobs == NULL) {
        return PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *job = PyList_GetItem(list, i);
        PyObject *heard = NULL;
        if (job != NULL && Py_TYPE(job) == (PyTypeObject *)state->job_type) {
            jobs[i] = handle_of(job)->job;
            heard = PyObject_CallFunction(state->audit, "si", "mrelease.kill",
                                          (int)job_result(jobs[i])->pid);
        }
        else if (job != NULL) {
            PyErr_SetString(PyExc_TypeError, "submit() takes Jobs");
        }
        if (heard == NULL) {
            PyMem_Free(jobs);
            return NULL;
        }
        Py_DECREF(heard);
    }
    int rc = pool_state(handle_of(pool)->pool);
    if (rc == POOL_OPEN) {
        Py_BEGIN_ALLOW_THREADS
        rc = pool_submit(handle_of(pool)->pool, jobs, (int)count);
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(jobs);
    return PyUnicode_FromString(pool_states[rc]);
}

/* Cut all graces short: SIGKILL now.  It has been sent on return. */
PyDoc_STRVAR(pool_hurry_doc, "hurry($self, /)\n--\n\n");

static PyObject *
pool_hurry_method(PyObject *self, PyObject *Py_UNUSED(args))
{
    struct pool *pool = handle_of(self)->pool;
    if (pool_state(pool) != POOL_FORKED) {
        Py_BEGIN_ALLOW_THREADS
        pool_hurry(pool);
        Py_END_ALLOW_THREADS
    }
    Py_RETURN_NONE;
}

/* Take no more jobs, and wait for those under way and for the threads, for so
 * many nanoseconds (-1: for ever); then graces are cut short.  Whether all was
 * done in time.  Raises what a signal handler raises.
 */
PyDoc_STRVAR(pool_close_doc, "close($self, timeout, /)\n--\n\n");

static PyObject *
pool_close_method(PyObject *self, PyObject *arg)
{
    struct pool *pool = handle_of(self)->pool;
    long long timeout = as_number(arg, "timeout", -1, LLONG_MAX);
    if (timeout == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (pool_state(pool) == POOL_FORKED) {
        Py_RETURN_TRUE;         /* there is nothing here to wait for */
    }
    int64_t now = reap_now();
    int64_t until =
        timeout < 0 || timeout > INT64_MAX - now ? INT64_MAX : now + timeout;
    for (;;) {
        int64_t soon = reap_now() + LOOK_AT_SIGNALS;
        bool is_last = until <= soon;
        bool in_time;
        Py_BEGIN_ALLOW_THREADS
        in_time = pool_close(pool, is_last ? until : soon, is_last);
        Py_END_ALLOW_THREADS
        if (in_time) {
            Py_RETURN_TRUE;
        }
        if (is_last) {
            Py_RETURN_FALSE;
        }
        if (PyErr_CheckSignals() < 0) {
            return NULL;
        }
    }
}

static void
pool_dealloc(PyObject *self)
{
    if (handle_of(self)->pool != NULL) {
        pool_release(handle_of(self)->pool);
    }
    handle_free(self);
}

static PyMethodDef pool_methods[] = {
    {"state", pool_state_method, METH_NOARGS, pool_state_doc},
    {"hurry", pool_hurry_method, METH_NOARGS, pool_hurry_doc},
    {"close", pool_close_method, METH_O, pool_close_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot pool_slots[] = {
    {Py_tp_doc, "Native threads that kill and release."},
    {Py_tp_dealloc, (void *)(uintptr_t)pool_dealloc},
    {Py_tp_methods, pool_methods},
    {0, NULL},
};

static PyType_Spec pool_spec = {
    .name = MODULE_NAME ".Pool",
    .basicsize = HANDLE_SIZE,
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION |
             Py_TPFLAGS_IMMUTABLETYPE,
    .slots = pool_slots,
};

/* A list of CPU numbers as a set; -1 with an exception set. */
static int
as_cpus(PyObject *list, cpu_set_t *cpus)
{
    CPU_ZERO(cpus);
    Py_ssize_t count = PyList_Size(list);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PyList_GetItem(list, i);
        long long cpu =
            item == NULL ? -1 : as_number(item, "a CPU", 0, CPU_SETSIZE - 1);
        if (cpu == -1) {
            return -1;
        }
        CPU_SET((size_t)cpu, cpus);
    }
    return 0;
}

static PyObject *
scheduling_tuple(const struct pool_scheduling *got)
{
    PyObject *cpus = PyList_New(0);
    for (int cpu = 0; cpus != NULL && cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET((size_t)cpu, &got->cpus)) {
            PyObject *number = PyLong_FromLong(cpu);
            if (number == NULL || PyList_Append(cpus, number) < 0) {
                Py_CLEAR(cpus);
            }
            Py_XDECREF(number);
        }
    }
    return Py_BuildValue("(iiiiN)", (int)got->attr.policy,
                         (int)got->attr.priority, (int)got->attr.nice,
                         got->refused, cpus);
}

/* Start a Pool: (pool, (policy, priority, nice, refused, cpus)).
 *
 * best and least are rungs of scheduling.h: 0 SCHED_FIFO 1, 1 nice -20, 2 the
 * best nice allowed, 3 none; cpus is a list, or None for the caller's.
 * refused is the errno for which it is not the best, or 0.  Raises OSError:
 * EPERM if not even the least may be had, EINVAL if no CPU is usable, EAGAIN
 * if there can be no more threads.
 */
PyDoc_STRVAR(pool_new_doc,
"pool_new($module, threads, spares, best, least, cpus, /)\n"
"--\n\n");

static PyObject *
pool_new_function(PyObject *module, PyObject *args)
{
    struct pool_options options = {0};
    struct pool_scheduling got;
    cpu_set_t cpus;
    PyObject *list;
    int best;
    int least;
    int err;

    if (!PyArg_ParseTuple(args, "iiiiO:pool_new", &options.threads,
                          &options.spares, &best, &least, &list))
    {
        return NULL;
    }
    options.best = (enum scheduling_rung)best;
    options.least = (enum scheduling_rung)least;
    if (list != Py_None) {
        if (as_cpus(list, &cpus) < 0) {
            return NULL;
        }
        options.cpus = &cpus;
    }
    PyObject *self = handle_new(get_state(module)->pool_type);
    if (self == NULL) {
        return NULL;
    }
    struct pool *pool = NULL;
    Py_BEGIN_ALLOW_THREADS
    err = pool_new(&options, &pool, &got);
    Py_END_ALLOW_THREADS
    if (err != 0) {
        Py_DECREF(self);
        return raise_errno(err);
    }
    handle_of(self)->pool = pool;
    return Py_BuildValue("(NN)", self, scheduling_tuple(&got));
}

/* Make each system call that a kill needs, harmlessly: {name: result}.
 *
 * 0: it works; an errno; -1: the caller of this one is killed (seen only from
 * a child); -2: no child could be made.
 */
PyDoc_STRVAR(probe_doc, "probe($module, in_child, /)\n--\n\n");

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

/* None, or OSError for an errno. */
static PyObject *
none_or_errno(int err)
{
    if (err != 0) {
        return raise_errno(err);
    }
    Py_RETURN_NONE;
}

/* mlockall(MCL_CURRENT | MCL_ONFAULT), with future also MCL_FUTURE.
 *
 * Raises OSError by errno.
 */
PyDoc_STRVAR(lock_memory_doc, "lock_memory($module, future, /)\n--\n\n");

static PyObject *
lock_memory(PyObject *Py_UNUSED(module), PyObject *arg)
{
    int err;
    int future = PyObject_IsTrue(arg);
    if (future < 0) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    err = harden_lock(future != 0);
    Py_END_ALLOW_THREADS
    return none_or_errno(err);
}

/* munlockall(2).  Raises OSError by errno. */
PyDoc_STRVAR(unlock_memory_doc, "unlock_memory($module, /)\n--\n\n");

static PyObject *
unlock_memory(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    int err;
    Py_BEGIN_ALLOW_THREADS
    err = harden_unlock();
    Py_END_ALLOW_THREADS
    return none_or_errno(err);
}

/* Whether what gets mapped from now on is locked (MCL_FUTURE is in force). */
PyDoc_STRVAR(locks_future_doc, "locks_future($module, /)\n--\n\n");

static PyObject *
locks_future(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    return PyBool_FromLong(harden_locks_future());
}

/* Whether this process may lock more than RLIMIT_MEMLOCK, or has no limit. */
PyDoc_STRVAR(may_lock_all_doc, "may_lock_all($module, /)\n--\n\n");

static PyObject *
may_lock_all(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    return PyBool_FromLong(harden_may_lock_all());
}

/* (policy, priority, nice, reset_on_fork) of the calling thread.
 *
 * Not by the os module, which has no such functions with musl.  Raises
 * OSError by errno.
 */
PyDoc_STRVAR(get_scheduling_doc, "get_scheduling($module, /)\n--\n\n");

static PyObject *
get_scheduling(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    struct sys_sched_attr attr;
    if (sys_sched_getattr(0, &attr) < 0) {
        return raise_errno(errno);
    }
    return Py_BuildValue("(IIiO)", attr.policy, attr.priority, attr.nice,
                         attr.flags & SYS_SCHED_RESET_ON_FORK ? Py_True
                                                              : Py_False);
}

/* Set what get_scheduling() gives.  Raises OSError by errno. */
PyDoc_STRVAR(set_scheduling_doc,
"set_scheduling($module, policy, priority, nice, reset_on_fork, /)\n"
"--\n\n");

static PyObject *
set_scheduling(PyObject *Py_UNUSED(module), PyObject *args)
{
    struct sys_sched_attr attr = {.size = sizeof(attr)};
    int reset;
    if (!PyArg_ParseTuple(args, "IIip:set_scheduling", &attr.policy,
                          &attr.priority, &attr.nice, &reset))
    {
        return NULL;
    }
    attr.flags = reset ? SYS_SCHED_RESET_ON_FORK : 0;
    return none_or_errno(sys_sched_setattr(0, &attr) < 0 ? errno : 0);
}

/* Give the calling thread the best that is allowed; it is not inherited.
 *
 * Raises OSError by errno: EPERM if nothing better is allowed.
 */
PyDoc_STRVAR(raise_scheduling_doc,
             "raise_scheduling($module, realtime, /)\n--\n\n");

static PyObject *
raise_scheduling(PyObject *Py_UNUSED(module), PyObject *arg)
{
    int realtime = PyObject_IsTrue(arg);
    return realtime < 0 ? NULL : none_or_errno(harden_schedule(realtime != 0));
}

/* Fork a child to be killed, which the program does not notice: its pid.
 *
 * For end_child(), in the same thread: it ends with it.  Raises OSError by
 * errno.
 */
PyDoc_STRVAR(start_child_doc, "start_child($module, /)\n--\n\n");

static PyObject *
start_child(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
    pid_t pid = child_start_idle();
    return pid < 0 ? raise_errno(errno) : PyLong_FromLong(pid);
}

/* Kill a child of start_child() if it still runs, and wait for it. */
PyDoc_STRVAR(end_child_doc, "end_child($module, pid, /)\n--\n\n");

static PyObject *
end_child(PyObject *Py_UNUSED(module), PyObject *arg)
{
    long long pid = as_number(arg, "pid", 1, INT_MAX);
    if (pid == -1) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    child_end((pid_t)pid);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"process_mrelease", (PyCFunction)(void (*)(void))process_mrelease,
     METH_FASTCALL, process_mrelease_doc},
    {"pidfd_open", pidfd_open, METH_O, pidfd_open_doc},
    {"pidfd_dup", pidfd_dup, METH_O, pidfd_dup_doc},
    {"pidfd_state", pidfd_state, METH_O, pidfd_state_doc},
    {"pidfd_signal", (PyCFunction)(void (*)(void))pidfd_signal, METH_FASTCALL,
     pidfd_signal_doc},
    {"file_system", file_system, METH_O, file_system_doc},
    {"open_inside", open_inside, METH_VARARGS, open_inside_doc},
    {"proc_is_ours", proc_is_ours, METH_NOARGS, proc_is_ours_doc},
    {"read_footprint", read_footprint, METH_O, read_footprint_doc},
    {"read_stat", read_stat, METH_O, read_stat_doc},
    {"is_in_exec", is_in_exec, METH_O, is_in_exec_doc},
    {"look_at_locks", look_at_locks, METH_O, look_at_locks_doc},
    {"reap", reap, METH_VARARGS, reap_doc},
    {"pool_new", pool_new_function, METH_VARARGS, pool_new_doc},
    {"job_new", job_new, METH_VARARGS, job_new_doc},
    {"submit", pool_submit_function, METH_VARARGS, pool_submit_doc},
    {"probe", probe, METH_O, probe_doc},
    {"lock_memory", lock_memory, METH_O, lock_memory_doc},
    {"unlock_memory", unlock_memory, METH_NOARGS, unlock_memory_doc},
    {"locks_future", locks_future, METH_NOARGS, locks_future_doc},
    {"may_lock_all", may_lock_all, METH_NOARGS, may_lock_all_doc},
    {"get_scheduling", get_scheduling, METH_NOARGS, get_scheduling_doc},
    {"set_scheduling", set_scheduling, METH_VARARGS, set_scheduling_doc},
    {"raise_scheduling", raise_scheduling, METH_O, raise_scheduling_doc},
    {"start_child", start_child, METH_NOARGS, start_child_doc},
    {"end_child", end_child, METH_O, end_child_doc},
    {NULL, NULL, 0, NULL},
};

static int
add_type(PyObject *module, PyType_Spec *spec, PyObject **type)
{
    *type = PyType_FromModuleAndSpec(module, spec, NULL);
    if (*type == NULL) {
        return -1;
    }
    return PyModule_AddType(module, (PyTypeObject *)*type);
}

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
    if (add_type(module, &pidfd_spec, &state->pidfd_type) < 0 ||
        add_type(module, &job_spec, &state->job_type) < 0)
    {
        return -1;
    }
    return add_type(module, &pool_spec, &state->pool_type);
}

static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    Py_VISIT(get_state(module)->audit);
    Py_VISIT(get_state(module)->pidfd_type);
    Py_VISIT(get_state(module)->job_type);
    Py_VISIT(get_state(module)->pool_type);
    return 0;
}

static int
module_clear(PyObject *module)
{
    Py_CLEAR(get_state(module)->audit);
    Py_CLEAR(get_state(module)->pidfd_type);
    Py_CLEAR(get_state(module)->job_type);
    Py_CLEAR(get_state(module)->pool_type);
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
PyInit__mrelease(void)          /* NOLINT(misc-use-internal-linkage) */
{
    return PyModuleDef_Init(&definition);
}
#endif
