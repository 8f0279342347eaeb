/*
 * libnwfilter: filters the traffic of virtual machines by libvirt's nwfilter documents.
 *
 * A driver holds filters and the bindings of ports to them on disk, and brings the kernel to what they ask for. Each change
 * is made as a whole or not at all. What every function of this header keeps to, and what its caller has to:
 *
 * - Handles. nwf_driver, nwf_transaction, nwf_event_queue, nwf_text and nwf_error are made by the library, and belong to
 *   the caller, who frees each once with the function of its name. A handle is not used after it was freed. To free null
 *   does nothing. A function that is given null for a handle that it needs returns NWF_INVALID_ARGUMENT.
 * - Each side frees its own: the library keeps no pointer of the caller after a call, and the caller never frees what the
 *   library points to but by the handle that it belongs to.
 * - Texts are UTF-8. One that is passed in is a pointer and the number of its bytes, or NWF_ZERO_TERMINATED, and does not
 *   change during the call. One that is handed out is also followed by a zero byte, which its length does not count.
 * - Results. A function that can fail returns an nwf_code. Its last argument may be null; otherwise *error is set to an error
 *   that says more, or to null if all went well. Where a function fails, what it would hand out is null, and nothing has
 *   changed.
 * - Structures begin with their size, which the caller sets before each call, so that programs run with libraries that are
 *   newer than their header.
 * - Threads. Any thread may call any function at any time, but nobody uses a handle while it is freed. A function that
 *   changes something returns when that is in force. No function of the caller is ever called, from no thread.
 * - Network namespaces. A call acts in that of the thread that makes it.
 * - Processes. A handle belongs to the process that made it. After a fork the child gets NWF_FORKED for it, and may free it;
 *   a child that wants a driver opens one of its own. File descriptors are closed by exec.
 * - There are no global variables: a program can have several drivers, and a library can use this one unknown to its program.
 *
 * This file is made from the sources of the crate nwfilter-capi.
 */

#ifndef NWFILTER_H
#define NWFILTER_H

#include <stddef.h>
#include <stdint.h>

/**
 * In place of a length: the text ends at its first zero byte.
 */
#define NWF_ZERO_TERMINATED SIZE_MAX

/**
 * The version of this interface. It is raised when a symbol, a type or a number changes or goes away, and is the number
 * in the name of the shared library.
 */
#define NWF_ABI_VERSION 1

/**
 * nwf_options.flags: starts no thread that learns the addresses of guests.
 */
#define NWF_OPEN_WITHOUT_LEARNER 1

/**
 * nwf_options.flags: refuses IP rules where bridge-nf-call-iptables is off, instead of switching it on (xtables).
 */
#define NWF_OPEN_KEEP_BRIDGE_NF 2

/**
 * nwf_options.flags: gives no connection a conntrack helper (xtables).
 */
#define NWF_OPEN_WITHOUT_HELPERS 4

/**
 * nwf_options.flags: owns the table from the first change on, and changes it for other processes, so that nobody else removes
 * it (nftables, from Linux 6.9). For a process that stays, and works in one network namespace.
 */
#define NWF_OPEN_OWNER 8

/**
 * For nwf_driver_define and nwf_transaction_define: takes rules with elements and attributes that do not exist, as libvirt
 * does. They then match more than is written.
 */
#define NWF_DEFINE_AS_LIBVIRT 1

/**
 * What a function says about how it went. New numbers may be added at the end.
 */
enum nwf_code
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * It is done.
   */
  NWF_OK = 0,
  /**
   * An argument breaks its contract: a pointer is null, a text is not UTF-8, a size or a number is not known.
   */
  NWF_INVALID_ARGUMENT = 1,
  /**
   * The handle was made before a fork of the process. A child opens its own driver.
   */
  NWF_FORKED = 2,
  /**
   * A bug of the library. The driver can be used on: a change was made as a whole or not at all.
   */
  NWF_PANIC = 3,
  /**
   * Another error; the message says which.
   */
  NWF_OTHER = 4,
  /**
   * A document is not valid: the error has diagnostics.
   */
  NWF_INVALID_DOCUMENT = 5,
  /**
   * No filter has that name.
   */
  NWF_NO_SUCH_FILTER = 6,
  /**
   * A filter that is built in cannot be removed.
   */
  NWF_STOCK_FILTER = 7,
  /**
   * Ports use the filter.
   */
  NWF_FILTER_IN_USE = 8,
  /**
   * A filter's UUID and name do not belong together.
   */
  NWF_UUID_CONFLICT = 9,
  /**
   * A filter would include itself.
   */
  NWF_INCLUDES_ITSELF = 10,
  /**
   * The port has no binding.
   */
  NWF_NO_SUCH_BINDING = 11,
  /**
   * The port has a binding already.
   */
  NWF_BINDING_EXISTS = 12,
  /**
   * A name cannot be one of a filter or of a network interface.
   */
  NWF_INVALID_NAME = 13,
  /**
   * There is no such network interface.
   */
  NWF_NO_SUCH_PORT = 14,
  /**
   * The filter makes no rules for the port: a variable has no value, an included filter does not exist.
   */
  NWF_NO_RULES = 15,
  /**
   * A parameter that steers how addresses are learned has a value it cannot have.
   */
  NWF_INVALID_PARAMETER = 16,
  /**
   * The kernel refused a rule or a set.
   */
  NWF_REFUSED = 17,
  /**
   * The backend cannot express the filter.
   */
  NWF_UNSUPPORTED = 18,
  /**
   * The host lacks a tool, a module of the kernel or a permission.
   */
  NWF_UNAVAILABLE = 19,
  /**
   * A file could not be read or written.
   */
  NWF_IO = 20,
  /**
   * Another process keeps the stores locked for longer than the driver waits.
   */
  NWF_LOCKED = 21,
  /**
   * The thread that carried out this change together with others failed.
   */
  NWF_ABANDONED = 22,
  /**
   * A packet to explain is not understood.
   */
  NWF_INVALID_QUESTION = 23,
  /**
   * Another backend filters ports of this host.
   */
  NWF_OTHER_BACKEND = 24,
  /**
   * The driver is keeping the kernel already.
   */
  NWF_ALREADY_KEEPING = 25,
  /**
   * No set has that name.
   */
  NWF_NO_SUCH_SET = 26,
  /**
   * Filters, other sets or ports use the set.
   */
  NWF_SET_IN_USE = 27,
  /**
   * A set cannot be so: an entry is of another family or is none, an included set does not exist, it holds too much.
   */
  NWF_INVALID_SET = 28,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum nwf_code nwf_code;
#else
typedef int32_t nwf_code;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * What happened. New numbers may be added at the end.
 */
enum nwf_event_kind
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * No event waits.
   */
  NWF_EVENT_NONE = 0,
  /**
   * No event will come any more, because the driver was freed.
   */
  NWF_EVENT_CLOSED = 1,
  /**
   * A filter was put into the store.
   */
  NWF_EVENT_FILTER_DEFINED = 2,
  /**
   * A filter was taken out of the store.
   */
  NWF_EVENT_FILTER_UNDEFINED = 3,
  /**
   * A port was bound.
   */
  NWF_EVENT_BINDING_CREATED = 4,
  /**
   * A bound port was given another binding.
   */
  NWF_EVENT_BINDING_REPLACED = 5,
  /**
   * A port was unbound.
   */
  NWF_EVENT_BINDING_DELETED = 6,
  /**
   * The guest at a port has other addresses than before; state says how far the port is from its filter.
   */
  NWF_EVENT_ADDRESS_CHANGED = 7,
  /**
   * The kernel did not have the rules of a port, and has them again.
   */
  NWF_EVENT_DRIFT_REPAIRED = 8,
  /**
   * The kernel did not have what all ports share, and has it again.
   */
  NWF_EVENT_HOST_REPAIRED = 9,
  /**
   * Events are missing here, because they were not taken out in time; lost says how many.
   */
  NWF_EVENT_LOST = 10,
  /**
   * Something that this version of the library has no number for.
   */
  NWF_EVENT_OTHER = 11,
  /**
   * A set was put into the store.
   */
  NWF_EVENT_SET_DEFINED = 12,
  /**
   * A set holds something else.
   */
  NWF_EVENT_SET_CHANGED = 13,
  /**
   * A set was taken out of the store.
   */
  NWF_EVENT_SET_UNDEFINED = 14,
  /**
   * A set does not hold in the kernel what it must; the report of a reload says why.
   */
  NWF_EVENT_SET_FAILED = 15,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum nwf_event_kind nwf_event_kind;
#else
typedef int32_t nwf_event_kind;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * What enforces the rules.
 */
enum nwf_backend
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * The one that filters ports of this host already; else nftables where the kernel has what it needs and no stored
   * filter names an ipset of the host; else xtables.
   */
  NWF_BACKEND_AUTO = 0,
  /**
   * One nftables table, over netlink.
   */
  NWF_BACKEND_NFTABLES = 1,
  /**
   * iptables, ip6tables and ebtables, with the chains of libvirt's driver.
   */
  NWF_BACKEND_XTABLES = 2,
  /**
   * No kernel: the rules are kept in memory, and every port has an interface. For tests of managers, without root.
   */
  NWF_BACKEND_FAKE = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum nwf_backend nwf_backend;
#else
typedef int32_t nwf_backend;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * Whose stores a driver works on.
 */
enum nwf_stores
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * The driver's own: a damaged file is moved aside, and what is dangerous in a stored filter is refused.
   */
  NWF_STORES_OWN = 0,
  /**
   * libvirt's: files stay where they are and are read as libvirt reads them.
   */
  NWF_STORES_LIBVIRT = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum nwf_stores nwf_stores;
#else
typedef int32_t nwf_stores;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * How bad a problem of a document is.
 */
enum nwf_severity
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * What is meant is ignored or replaced.
   */
  NWF_WARNING = 1,
  /**
   * The document is refused.
   */
  NWF_ERROR = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum nwf_severity nwf_severity;
#else
typedef int32_t nwf_severity;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * A driver: filters and bindings on disk, and the kernel as they ask for. It belongs to the caller, who frees it with
 * nwf_driver_free. Threads may use it at the same time; those that change something at the same time share the work.
 */
typedef struct nwf_driver nwf_driver;

/**
 * Why a call failed. It belongs to the caller, who frees it with nwf_error_free. It never changes, so that threads may
 * read it at the same time, and it outlives its driver.
 */
typedef struct nwf_error nwf_error;

/**
 * The events of a driver since nwf_driver_events. It belongs to the caller, who frees it with nwf_event_queue_free. It may
 * outlive its driver. At most 1024 events wait in it; how many were lost is an event. Threads may take from it at the same
 * time.
 */
typedef struct nwf_event_queue nwf_event_queue;

/**
 * A text that a function handed out: UTF-8, followed by a zero byte. It belongs to the caller, who frees it with
 * nwf_text_free. It never changes, so that threads may read it at the same time.
 */
typedef struct nwf_text nwf_text;

/**
 * Changes that nwf_driver_commit makes together or not at all. It belongs to the caller, who frees it with
 * nwf_transaction_free. Threads may add to it at the same time.
 */
typedef struct nwf_transaction nwf_transaction;

/**
 * What a driver is opened with. Bytes that are zero ask for the default, so that a caller sets size and what differs:
 * nwf_options options = {.size = sizeof options, .backend = NWF_BACKEND_FAKE};
 */
typedef struct nwf_options {
  /**
   * sizeof(nwf_options)
   */
  size_t size;
  /**
   * The filter store. Null: /etc/nwfilter, or /etc/libvirt/nwfilter for libvirt's stores.
   */
  const char *config_dir;
  /**
   * The bytes of config_dir, or NWF_ZERO_TERMINATED.
   */
  size_t config_dir_length;
  /**
   * The binding store. Null: /run/nwfilter, or /run/libvirt/nwfilter-binding for libvirt's stores.
   */
  const char *state_dir;
  /**
   * The bytes of state_dir, or NWF_ZERO_TERMINATED.
   */
  size_t state_dir_length;
  /**
   * What enforces the rules: an nwf_backend.
   */
  int32_t backend;
  /**
   * Whose stores they are: an nwf_stores.
   */
  int32_t stores;
  /**
   * NWF_OPEN_… together.
   */
  uint32_t flags;
  /**
   * How many milliseconds a change waits for another process that keeps the stores locked; 0 waits without limit.
   */
  uint32_t patience;
} nwf_options;

/**
 * Where the text is that an error is about. The caller sets size.
 */
typedef struct nwf_place {
  /**
   * sizeof(nwf_place)
   */
  size_t size;
  /**
   * The document as the caller named it; the file of a stored filter; or the name of a filter. It is there until the
   * error is freed.
   */
  const char *document;
  /**
   * The bytes of document.
   */
  size_t document_length;
  /**
   * The line, from 1.
   */
  uint32_t line;
  /**
   * The column in characters, from 1; 0 if only the line is known.
   */
  uint32_t column;
  /**
   * How many characters are meant; 0 if only the line is known.
   */
  uint32_t length;
  /**
   * Always 0.
   */
  uint32_t reserved;
} nwf_place;

/**
 * A problem of a document. The caller sets size. The texts are there until the error is freed.
 */
typedef struct nwf_diagnostic {
  /**
   * sizeof(nwf_diagnostic)
   */
  size_t size;
  /**
   * What kind of problem it is, such as "NWF0012": docs/diagnostics.md.
   */
  const char *code;
  /**
   * The bytes of code.
   */
  size_t code_length;
  /**
   * What is wrong.
   */
  const char *message;
  /**
   * The bytes of message.
   */
  size_t message_length;
  /**
   * What to do about it; null if nothing is known.
   */
  const char *help;
  /**
   * The bytes of help.
   */
  size_t help_length;
  /**
   * How bad it is: an nwf_severity.
   */
  int32_t severity;
  /**
   * The line, from 1.
   */
  uint32_t line;
  /**
   * The column in characters, from 1.
   */
  uint32_t column;
  /**
   * How many characters of the line it covers.
   */
  uint32_t length;
} nwf_diagnostic;

/**
 * An event. The caller sets size.
 */
typedef struct nwf_event {
  /**
   * sizeof(nwf_event)
   */
  size_t size;
  /**
   * What happened.
   */
  nwf_event_kind kind;
  /**
   * The bytes of name.
   */
  uint32_t name_length;
  /**
   * How many events were lost, of NWF_EVENT_LOST; else 0.
   */
  uint64_t lost;
  /**
   * The filter, the set or the port, followed by a zero byte; empty where there is none.
   */
  char name[256];
  /**
   * Of NWF_EVENT_ADDRESS_CHANGED one of: filtered, learning, unattended, refused, learned, leased. Else empty.
   */
  char state[32];
} nwf_event;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The version of the interface that the loaded library has: NWF_ABI_VERSION when it was built.
 */
uint32_t nwf_abi_version(void);

/**
 * The version of the loaded library, such as "0.1.0". The text is part of the library.
 */
const char *nwf_version(void);

/**
 * The name of a code, such as "NWF_NO_SUCH_FILTER"; "NWF_OTHER" for a number that is none. The text is part of the
 * library.
 */
const char *nwf_code_name(int32_t code);

/**
 * Opens a driver. Null for `options` asks for all defaults. The stores are read; nothing is written, neither to disk nor
 * to the kernel. What the driver does later, it does in the network namespace of the thread that calls it.
 */
nwf_code nwf_driver_open(const struct nwf_options *options,
                         struct nwf_driver **driver,
                         struct nwf_error **error);

/**
 * Frees a driver; nothing if it is null. Its threads end, and its event queues close. The rules stay in the kernel. No
 * other call may use the driver meanwhile.
 */
void nwf_driver_free(struct nwf_driver *driver);

/**
 * What enforces the rules: "nftables", "xtables" or "fake". The text is part of the library. Null if the driver is null.
 */
const char *nwf_driver_backend(const struct nwf_driver *driver);

/**
 * Puts a filter into the store, in place of one of its name, and updates the ports that use it, all or nothing. `document`
 * names the document in errors and may be null. `flags` is 0 or NWF_DEFINE_AS_LIBVIRT. `report` may be null; otherwise
 * it is set to what was done, as nwf_driver_commit does.
 */
nwf_code nwf_driver_define(const struct nwf_driver *driver,
                           const char *document,
                           size_t document_length,
                           const char *xml,
                           size_t xml_length,
                           uint32_t flags,
                           struct nwf_text **report,
                           struct nwf_error **error);

/**
 * Removes a filter from the store. Refused while a port uses it (NWF_FILTER_IN_USE).
 */
nwf_code nwf_driver_undefine(const struct nwf_driver *driver,
                             const char *name,
                             size_t name_length,
                             struct nwf_error **error);

/**
 * Every filter of the store and every stock filter, sorted by name, as JSON: [{"name", "uuid", "source": "store"|"stock"}].
 */
nwf_code nwf_driver_filters(const struct nwf_driver *driver,
                            struct nwf_text **json,
                            struct nwf_error **error);

/**
 * A filter in canonical form.
 */
nwf_code nwf_driver_filter_xml(const struct nwf_driver *driver,
                               const char *name,
                               size_t name_length,
                               struct nwf_text **xml,
                               struct nwf_error **error);

/**
 * Filters a port, which must have an interface (NWF_NO_SUCH_PORT) and no binding (NWF_BINDING_EXISTS). `document` names
 * the binding's document in errors and may be null. `report` may be null; otherwise it is set to what was done, as
 * nwf_driver_commit does.
 */
nwf_code nwf_driver_bind(const struct nwf_driver *driver,
                         const char *document,
                         size_t document_length,
                         const char *xml,
                         size_t xml_length,
                         struct nwf_text **report,
                         struct nwf_error **error);

/**
 * Filters a port, whatever it had before: at every moment either the old rules or the new ones hold. If it has this very
 * binding already, only what the kernel lost of it is written. Else as nwf_driver_bind.
 */
nwf_code nwf_driver_replace(const struct nwf_driver *driver,
                            const char *document,
                            size_t document_length,
                            const char *xml,
                            size_t xml_length,
                            struct nwf_text **report,
                            struct nwf_error **error);

/**
 * Stops filtering a port; no trace of it is left in the kernel.
 */
nwf_code nwf_driver_unbind(const struct nwf_driver *driver,
                           const char *port,
                           size_t port_length,
                           struct nwf_error **error);

/**
 * Every binding, sorted by port, and how far its port is from its filter, as JSON: [{"port", "filter", "mac",
 * "owner": {"name", "uuid"}, "address": {"state", …}}].
 */
nwf_code nwf_driver_bindings(const struct nwf_driver *driver,
                             struct nwf_text **json,
                             struct nwf_error **error);

/**
 * The binding of a port in canonical form.
 */
nwf_code nwf_driver_binding_xml(const struct nwf_driver *driver,
                                const char *port,
                                size_t port_length,
                                struct nwf_text **xml,
                                struct nwf_error **error);

/**
 * Makes the changes of a transaction, or none of them. Whether it succeeds or not, the transaction has none left
 * afterwards, and can be filled again.
 *
 * `report` may be null; otherwise it is set to what was done, as JSON: {"filters": [{"name", "uuid"}], "sets":
 * [{"name", "family", "entries": number, "includes": [name], "tags": [tag]}], "changed": [port], "changed_sets":
 * [name], "warnings": [text], "documents": [{"document", "code", "line", "column", "message", "help"}], "cut":
 * {"ended": [{"port", "protocol", "source", "destination", "ending": "forgotten"|"stalled"}], "failures": [text]}}.
 * "sets" has the sets that were defined or changed, "cut" what nwf_transaction_cut_connections asked for, "changed" the
 * ports whose rules were written, "warnings" what does not work although they were, "documents" what of the documents
 * is ignored or replaced.
 */
nwf_code nwf_driver_commit(const struct nwf_driver *driver,
                           struct nwf_transaction *transaction,
                           struct nwf_text **report,
                           struct nwf_error **error);

/**
 * What a commit of the transaction would change, as JSON: {"stores": [text], "rules": [{"port", "table", "chain", "kind":
 * "missing"|"foreign", "rule", "origin"}], "warnings": [text]}. "missing" rules would be written, "foreign" ones removed.
 * Nothing is changed, and the transaction stays as it is.
 */
nwf_code nwf_driver_plan(const struct nwf_driver *driver,
                         const struct nwf_transaction *transaction,
                         struct nwf_text **json,
                         struct nwf_error **error);

/**
 * Brings the kernel to what the bindings ask for, such as after a start of the host. One failing port does not block the
 * others. `report` may be null; otherwise it is set to what was done, as JSON: {"changed": [port], "removed": [port],
 * "failed": [{"port", "filter", "fallback", "why"}], "failed_sets": [{"set", "why"}], "unbound": [port], "absent": [port],
 * "warnings": [text]}.
 */
nwf_code nwf_driver_reload(const struct nwf_driver *driver,
                           struct nwf_text **report,
                           struct nwf_error **error);

/**
 * How the kernel differs from what the bindings ask for, as JSON: {"differences": [{"port", "table", "chain", "kind",
 * "rule", "origin"}], "failed": […], "failed_sets": […], "unbound": [port], "absent": [port], "warnings": [text]}. Nothing is changed.
 */
nwf_code nwf_driver_diff(const struct nwf_driver *driver,
                         struct nwf_text **json,
                         struct nwf_error **error);

/**
 * Filters, ports and the kernel at a glance, as JSON: {"backend", "filters": number, "stock_filters": number, "sets": number, "ports": as
 * nwf_driver_bindings, "problems": [text], "differences": number or null, "error": text or null}. Where the kernel
 * cannot be asked, "differences" is null and "error" says why.
 */
nwf_code nwf_driver_status(const struct nwf_driver *driver,
                           struct nwf_text **json,
                           struct nwf_error **error);

/**
 * Which rule decides a packet of a port, and why, as JSON: docs/explain.md. `question` is the packet in words, such as
 * "in tcp from 192.0.2.7:40000 to :80 new"; one that is not understood is NWF_INVALID_QUESTION. No kernel is asked.
 */
nwf_code nwf_driver_explain(const struct nwf_driver *driver,
                            const char *port,
                            size_t port_length,
                            const char *question,
                            size_t question_length,
                            struct nwf_text **json,
                            struct nwf_error **error);

/**
 * The rules that a binding would have now, as JSON, without touching anything. `document` names the document in errors and
 * may be null.
 */
nwf_code nwf_driver_ruleset(const struct nwf_driver *driver,
                            const char *document,
                            size_t document_length,
                            const char *xml,
                            size_t xml_length,
                            struct nwf_text **json,
                            struct nwf_error **error);

/**
 * What every rule of a filter has counted for bound ports since it was written to the kernel, as JSON: {"rules": [{"rule":
 * "FILTER:LINE", "stops": whether it stops packets, "packets", "bytes", "ports": [port]}], "differing": [port]}.
 * "differing" has the ports of which the kernel does not hold all rules. Nothing is changed.
 */
nwf_code nwf_driver_counters(const struct nwf_driver *driver,
                             struct nwf_text **json,
                             struct nwf_error **error);

/**
 * Numbers about a driver since it was opened, as a JSON object. Waits for nothing.
 */
nwf_code nwf_driver_metrics(const struct nwf_driver *driver,
                            struct nwf_text **json,
                            struct nwf_error **error);

/**
 * The same, and how many ports are in which state, as OpenMetrics text, which Prometheus and others read.
 */
nwf_code nwf_driver_openmetrics(const struct nwf_driver *driver,
                                struct nwf_text **text,
                                struct nwf_error **error);

/**
 * Follows what happens from here on: what this driver does, its learning of addresses and its repairs included, but not
 * what other processes do.
 */
nwf_code nwf_driver_events(const struct nwf_driver *driver,
                           struct nwf_event_queue **queue,
                           struct nwf_error **error);

/**
 * Brings the kernel to what the bindings ask for, and keeps it there: a thread of the library repairs what others change,
 * until nwf_driver_stop_keeping or nwf_driver_free. NWF_ALREADY_KEEPING if one does so already.
 */
nwf_code nwf_driver_keep(const struct nwf_driver *driver,
                         struct nwf_error **error);

/**
 * Ends what nwf_driver_keep began; nothing if it did not. The rules stay. Waits for a repair that is being made.
 */
nwf_code nwf_driver_stop_keeping(const struct nwf_driver *driver,
                                 struct nwf_error **error);

/**
 * What kind of error it is; NWF_OK if the error is null.
 */
nwf_code nwf_error_code(const struct nwf_error *error);

/**
 * What went wrong, and its bytes in *length unless that is null. The text is there until the error is freed. Null if the
 * error is null.
 */
const char *nwf_error_message(const struct nwf_error *error,
                              size_t *length);

/**
 * How many causes the error has.
 */
size_t nwf_error_cause_count(const struct nwf_error *error);

/**
 * A cause of the error: number 0 is that of the message, number 1 the cause of that. Null where there is none.
 */
const char *nwf_error_cause(const struct nwf_error *error,
                            size_t number,
                            size_t *length);

/**
 * Where the text is that the error is about: 1 if *place is filled, 0 if no place is known or size is not set.
 */
int32_t nwf_error_place(const struct nwf_error *error,
                        struct nwf_place *place);

/**
 * How many problems of the document the error has; 0 unless its code is NWF_INVALID_DOCUMENT.
 */
size_t nwf_error_diagnostic_count(const struct nwf_error *error);

/**
 * A problem of the document, in the order of the document, from 0: 1 if *diagnostic is filled, 0 if there is none of that
 * number or size is not set.
 */
int32_t nwf_error_diagnostic(const struct nwf_error *error,
                             size_t number,
                             struct nwf_diagnostic *diagnostic);

/**
 * Frees an error; nothing if it is null.
 */
void nwf_error_free(struct nwf_error *error);

/**
 * The file descriptor to poll for reading: it is readable while events wait, and when the driver was freed. It may be so
 * once more than there are events. It belongs to the queue, and nobody else reads or closes it. -1 if the queue is null.
 */
int32_t nwf_event_queue_fd(const struct nwf_event_queue *queue);

/**
 * Takes the next event out, and never waits: *event is of the kind NWF_EVENT_NONE if none waits. A main loop calls it
 * until then, each time that the file descriptor is readable.
 */
nwf_code nwf_event_queue_next(struct nwf_event_queue *queue,
                              struct nwf_event *event,
                              struct nwf_error **error);

/**
 * The name of a kind, such as "binding-created"; "other" for a number that is none. The text is part of the library.
 */
const char *nwf_event_kind_name(int32_t kind);

/**
 * Frees a queue and closes its file descriptor; nothing if it is null.
 */
void nwf_event_queue_free(struct nwf_event_queue *queue);

/**
 * Puts a set into the store, in place of one of its name, and what it holds into the kernel: a document <filterset>. `document`
 * names it in errors and may be null. `report` may be null; otherwise it is set to what was done, as nwf_driver_commit does.
 */
nwf_code nwf_driver_define_set(const struct nwf_driver *driver,
                               const char *document,
                               size_t document_length,
                               const char *xml,
                               size_t xml_length,
                               struct nwf_text **report,
                               struct nwf_error **error);

/**
 * Removes a set from the store and from the kernel. Refused while a filter, another set or a port uses it (NWF_SET_IN_USE).
 */
nwf_code nwf_driver_undefine_set(const struct nwf_driver *driver,
                                 const char *name,
                                 size_t name_length,
                                 struct nwf_error **error);

/**
 * Adds entries to a set, all or none: one a line, such as 10.0.0.0/24, each with a comment behind # if there is one.
 * `report` is as of nwf_driver_commit.
 */
nwf_code nwf_driver_add_to_set(const struct nwf_driver *driver,
                               const char *name,
                               size_t name_length,
                               const char *entries,
                               size_t entries_length,
                               struct nwf_text **report,
                               struct nwf_error **error);

/**
 * Takes entries out of a set, all or none, one a line. Each must be an entry of the set itself. `report` is as of
 * nwf_driver_commit.
 */
nwf_code nwf_driver_remove_from_set(const struct nwf_driver *driver,
                                    const char *name,
                                    size_t name_length,
                                    const char *entries,
                                    size_t entries_length,
                                    struct nwf_text **report,
                                    struct nwf_error **error);

/**
 * Puts entries, one a line, in the place of all entries of a set. Its includes and tags stay. `report` is as of
 * nwf_driver_commit.
 */
nwf_code nwf_driver_replace_in_set(const struct nwf_driver *driver,
                                   const char *name,
                                   size_t name_length,
                                   const char *entries,
                                   size_t entries_length,
                                   struct nwf_text **report,
                                   struct nwf_error **error);

/**
 * Every set, sorted by name, as JSON: [{"name", "family": "ipv4"|"ipv6"|"mac"|"port", "entries": number, "includes": [name],
 * "tags": [tag]}].
 */
nwf_code nwf_driver_sets(const struct nwf_driver *driver,
                         struct nwf_text **json,
                         struct nwf_error **error);

/**
 * A set in canonical form.
 */
nwf_code nwf_driver_set_xml(const struct nwf_driver *driver,
                            const char *name,
                            size_t name_length,
                            struct nwf_text **xml,
                            struct nwf_error **error);

/**
 * All that a set holds, its includes and the known addresses of its tags' ports among it, as JSON: [text].
 */
nwf_code nwf_driver_set_content(const struct nwf_driver *driver,
                                const char *name,
                                size_t name_length,
                                struct nwf_text **json,
                                struct nwf_error **error);

/**
 * Adds: put a set into the store, in place of one of its name. The document is read now, and refused now if it is not valid.
 * `document` names it in errors and may be null.
 */
nwf_code nwf_transaction_define_set(struct nwf_transaction *transaction,
                                    const char *document,
                                    size_t document_length,
                                    const char *xml,
                                    size_t xml_length,
                                    struct nwf_error **error);

/**
 * Adds: remove a set. A commit is refused while a filter, another set or a port uses it.
 */
nwf_code nwf_transaction_undefine_set(struct nwf_transaction *transaction,
                                      const char *name,
                                      size_t name_length,
                                      struct nwf_error **error);

/**
 * Adds: add entries to a set, one a line.
 */
nwf_code nwf_transaction_add_to_set(struct nwf_transaction *transaction,
                                    const char *name,
                                    size_t name_length,
                                    const char *entries,
                                    size_t entries_length,
                                    struct nwf_error **error);

/**
 * Adds: take entries out of a set, one a line.
 */
nwf_code nwf_transaction_remove_from_set(struct nwf_transaction *transaction,
                                         const char *name,
                                         size_t name_length,
                                         const char *entries,
                                         size_t entries_length,
                                         struct nwf_error **error);

/**
 * Adds: put entries, one a line, in the place of all entries of a set.
 */
nwf_code nwf_transaction_replace_in_set(struct nwf_transaction *transaction,
                                        const char *name,
                                        size_t name_length,
                                        const char *entries,
                                        size_t entries_length,
                                        struct nwf_error **error);

/**
 * Has the commit also end the connections of the ports concerned that could not begin by the new rules. The report of the
 * commit says which were ended, as "cut".
 */
nwf_code nwf_transaction_cut_connections(struct nwf_transaction *transaction,
                                         struct nwf_error **error);

/**
 * The bytes of a text, and their number without the zero byte in *length unless that is null. They are there until the
 * text is freed. Null if the text is null.
 */
const char *nwf_text_data(const struct nwf_text *text,
                          size_t *length);

/**
 * Frees a text; nothing if it is null.
 */
void nwf_text_free(struct nwf_text *text);

/**
 * Makes a transaction without any change. It is never null.
 */
struct nwf_transaction *nwf_transaction_new(void);

/**
 * Adds: put a filter into the store, in place of one of its name, and update the ports that use it. The document is read
 * now, and refused now if it is not valid (NWF_INVALID_DOCUMENT). `document` names it in errors and may be null. `flags`
 * is 0 or NWF_DEFINE_AS_LIBVIRT.
 */
nwf_code nwf_transaction_define(struct nwf_transaction *transaction,
                                const char *document,
                                size_t document_length,
                                const char *xml,
                                size_t xml_length,
                                uint32_t flags,
                                struct nwf_error **error);

/**
 * Adds: remove a filter from the store. A commit is refused while a port uses it.
 */
nwf_code nwf_transaction_undefine(struct nwf_transaction *transaction,
                                  const char *name,
                                  size_t name_length,
                                  struct nwf_error **error);

/**
 * Adds: filter a port, which must have an interface and no binding. The document is read now, and refused now if it is
 * not valid. `document` names it in errors and may be null.
 */
nwf_code nwf_transaction_bind(struct nwf_transaction *transaction,
                              const char *document,
                              size_t document_length,
                              const char *xml,
                              size_t xml_length,
                              struct nwf_error **error);

/**
 * The same for a port that may have a binding, which is replaced.
 */
nwf_code nwf_transaction_replace(struct nwf_transaction *transaction,
                                 const char *document,
                                 size_t document_length,
                                 const char *xml,
                                 size_t xml_length,
                                 struct nwf_error **error);

/**
 * Adds: stop filtering a port.
 */
nwf_code nwf_transaction_unbind(struct nwf_transaction *transaction,
                                const char *port,
                                size_t port_length,
                                struct nwf_error **error);

/**
 * How many changes a transaction has; 0 if it is null.
 */
size_t nwf_transaction_length(const struct nwf_transaction *transaction);

/**
 * Frees a transaction; nothing if it is null. Changes that were not committed are not made.
 */
void nwf_transaction_free(struct nwf_transaction *transaction);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* NWFILTER_H */
