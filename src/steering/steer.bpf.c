// Sends new clients straight to the server's own listening socket. `.ci/bpf` compiles this file into steer.bpf.o.
//
// A compiler is all that a build needs: the few names of the kernel's interface stand here, with the numbers of linux/bpf.h.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define SEC(name) __attribute__((section(name), used))
#define INT(name, value) int (*name)[value]
#define TYPE(name, type) type *name

enum { ARRAY = 2, SOCKMAP = 15, SK_STORAGE = 24 }; // BPF_MAP_TYPE_
enum { NO_PREALLOC = 1, CLONE = 512 }; // BPF_F_
enum { PASS = 1, AF_INET = 2, TCP = 6, LISTEN = 10, ENOENT = 2, ENODEV = 19, EINVAL = 22 };

struct bpf_sock {
    u32 bound_dev_if, family, type, protocol, mark, priority, src_ip4, src_ip6[4], src_port;
    u16 dst_port, : 16;
    u32 dst_ip4, dst_ip6[4], state;
};

struct bpf_sk_lookup {
    union {
        struct bpf_sock *sk;
        u64 cookie;
    };
    u32 family, protocol, remote_ip4, remote_ip6[4];
    u16 remote_port, : 16;
    u32 local_ip4, local_ip6[4], local_port;
};

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static long (*bpf_map_delete_elem)(void *map, const void *key) = (void *)3;
static long (*bpf_skb_load_bytes)(const void *skb, u32 offset, void *to, u32 length) = (void *)26;
static long (*bpf_sk_release)(void *socket) = (void *)86;
static struct bpf_sock *(*bpf_skc_lookup_tcp)(void *ctx, void *tuple, u32 size, u64 netns, u64 flags) = (void *)99;
static long (*bpf_sk_assign)(void *ctx, void *socket, u64 flags) = (void *)124;
static u64 (*bpf_ktime_get_boot_ns)(void) = (void *)125;

#define SLOTS 4
#define ADDRESSES_MAX 8

// Listeners of the server; the kernel removes each when it closes.
struct {
    INT(type, SOCKMAP);
    INT(max_entries, SLOTS);
    TYPE(key, u32);
    TYPE(value, u32);
} servers SEC(".maps");

// Our own listeners of IPv4 and IPv6 while they are bound to another port.
struct {
    INT(type, SOCKMAP);
    INT(max_entries, 2);
    TYPE(key, u32);
    TYPE(value, u32);
} catchers SEC(".maps");

// Sockets that are ours; what a listener accepts inherits its mark. No program reads them, but the count does.
struct {
    INT(type, SK_STORAGE);
    INT(map_flags, NO_PREALLOC | CLONE);
    TYPE(key, int);
    TYPE(value, u32);
} marks SEC(".maps");

enum { UNTIL, ASSIGNED, TAKEN, WORDS };
// The end of steering by the clock since the start of the host; SYNs that were steered; SYNs that another program took first.
struct {
    INT(type, ARRAY);
    INT(max_entries, WORDS);
    TYPE(key, u32);
    TYPE(value, u64);
} state SEC(".maps");

// Our own addresses in network order, those of IPv4 mapped. A wildcard takes every address of its family.
const volatile u32 port, count, any_ipv4, any_ipv6;
const volatile u32 addresses[ADDRESSES_MAX][4];

// Volatile, so that each word is read before the choice between them: the verifier refuses a choice between two pointers.
static __attribute__((always_inline)) int is_ours(const volatile struct bpf_sk_lookup *ctx) {
    int is_ipv4 = ctx->family == AF_INET;
    u32 ip4 = ctx->local_ip4;
    u32 ip[4] = {ctx->local_ip6[0], ctx->local_ip6[1], ctx->local_ip6[2], ctx->local_ip6[3]};
    if (is_ipv4 ? any_ipv4 : any_ipv6)
        return 1;
    if (is_ipv4) {
        ip[2] = __builtin_bswap32(0xffff);
        ip[3] = ip4;
    }
    for (u32 i = 0; i < ADDRESSES_MAX && i < count; i++)
        if (!((ip[0] ^ addresses[i][0]) | (ip[1] ^ addresses[i][1]) | (ip[2] ^ addresses[i][2]) | (ip[3] ^ addresses[i][3])))
            return 1;
    return 0;
}

static __attribute__((always_inline)) void add_one(u32 word) {
    u64 *value = bpf_map_lookup_elem(&state, &word);
    if (value)
        __sync_fetch_and_add(value, 1);
}

// Fails on an empty slot, and where a listener does not take the client's family.
static __attribute__((always_inline)) int assign(struct bpf_sk_lookup *ctx, void *listeners, u32 slot) {
    void *listener = bpf_map_lookup_elem(listeners, &slot);
    if (!listener)
        return 0;
    long error = bpf_sk_assign(ctx, listener, 0);
    bpf_sk_release(listener);
    return !error;
}

SEC("sk_lookup") int steer(struct bpf_sk_lookup *ctx) {
    // The program sees each SYN and each datagram to an unconnected socket of the whole namespace.
    if (ctx->protocol != TCP || ctx->local_port != port || !is_ours(ctx))
        return PASS;
    if (ctx->sk) {
        add_one(TAKEN);
        return PASS;
    }
    u32 word = UNTIL;
    u64 *until = bpf_map_lookup_elem(&state, &word);
    if (until && bpf_ktime_get_boot_ns() < *until) {
#pragma unroll
        for (u32 slot = 0; slot < SLOTS; slot++)
            if (assign(ctx, &servers, slot)) {
                add_one(ASSIGNED);
                return PASS;
            }
    }
    if (!assign(ctx, &catchers, 0))
        assign(ctx, &catchers, 1);
    return PASS;
}

struct question {
    u32 slot, size;
    u8 tuple[36];
};

// Puts into the slot the listener that a dial from the one address to the other would reach, or empties it. It is only run on
// a question behind an Ethernet header, and returns an errno.
SEC("classifier") int find(void *skb) {
    struct question question;
    if (bpf_skb_load_bytes(skb, 14, &question, sizeof(question)))
        return EINVAL;
    if (question.slot >= SLOTS)
        return EINVAL;
    struct bpf_sock *found = question.size == 12 ? bpf_skc_lookup_tcp(skb, question.tuple, 12, -1ULL, 0)
                                                 : bpf_skc_lookup_tcp(skb, question.tuple, 36, -1ULL, 0);
    int error = ENOENT;
    if (found) {
        // What it accepts would be bound to its device too, and could answer nobody else.
        if (found->bound_dev_if)
            error = ENODEV;
        else if (found->state == LISTEN)
            error = -bpf_map_update_elem(&servers, &question.slot, found, 0);
        bpf_sk_release(found);
    }
    if (error)
        bpf_map_delete_elem(&servers, &question.slot);
    return error;
}

SEC("license") const char licence[] = "MIT";
